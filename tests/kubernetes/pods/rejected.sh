# What a VM cannot share is rejected, and kubectl describe says why. runc runs such pods.
refused() {
    pod
    if [ "$CLASS" = runc ]; then
        await condition=Ready
    else
        kubectl wait --for=jsonpath='{.reason}'="$2" --timeout=120s event --field-selector "involvedObject.name=$POD,reason=$2" >/dev/null
        kubectl describe pod "$POD" | grep -q "$3" || { kubectl describe pod "$POD" >&2; exit 1; }
    fi
    kubectl delete pod "$POD" --timeout=120s >/dev/null
    kubectl delete events --field-selector "involvedObject.name=$POD" >/dev/null
    echo "$1: as expected"
}
container="terminationGracePeriodSeconds: 0
containers:
- name: box
  image: $BUSYBOX
  command: [sleep, \"100000\"]"
refused hostNetwork FailedCreatePodSandBox 'network' <<END
hostNetwork: true
$container
END
refused hostIPC FailedCreatePodSandBox 'IPC' <<END
hostIPC: true
$container
END
refused Bidirectional Failed 'Bidirectional' <<END
$container
  securityContext: {privileged: true}
  volumeMounts: [{name: files, mountPath: /files, mountPropagation: Bidirectional}]
volumes: [{name: files, hostPath: {path: $FILES}}]
END
