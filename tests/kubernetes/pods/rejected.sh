# What a VM cannot share is rejected, and kubectl describe says why. runc runs such pods.
describes() { kubectl describe pod "$POD" | grep -q "$1"; }
# refused NAME REASON creates the pod of stdin.
refused() {
    pod
    if [ "$CLASS" = runc ]; then
        await condition=Ready
    else
        until_true describes "$2"
    fi
    kubectl delete pod "$POD" --timeout=120s >/dev/null
    echo "$1: as expected"
}
container="terminationGracePeriodSeconds: 0
containers:
- name: box
  image: $BUSYBOX
  command: [sleep, \"100000\"]"
refused hostNetwork 'FailedCreatePodSandBox.*hostNetwork.*a VM cannot share' <<END
hostNetwork: true
$container
END
refused hostIPC 'FailedCreatePodSandBox.*hostIPC.*a VM cannot share' <<END
hostIPC: true
$container
END
refused hostPID 'FailedCreatePodSandBox.*hostPID.*a VM cannot share' <<END
hostPID: true
$container
END
refused Bidirectional 'Failed.*mountPropagation Bidirectional' <<END
$container
  securityContext: {privileged: true}
  volumeMounts: [{name: files, mountPath: /files, mountPropagation: Bidirectional}]
volumes: [{name: files, hostPath: {path: $FILES}}]
END
