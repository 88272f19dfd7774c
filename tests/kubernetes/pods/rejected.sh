# What a VM cannot share is rejected, and kubectl describe says why. runc runs such pods.
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
$(sleeper box)"
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
# A socket, or a device, whose other end is in the node's kernel.
mounted() {
    refused "hostPath $1" "Failed.*$2" <<END
$container
  volumeMounts: [{name: file, mountPath: /file}]
volumes: [{name: file, hostPath: {path: $FILES/$1, type: $1}}]
END
}
python3 -c 'import socket, sys; socket.socket(socket.AF_UNIX).bind(sys.argv[1])' "$FILES/Socket"
mknod "$FILES/CharDevice" c 1 2
mknod "$FILES/BlockDevice" b 7 0
mounted Socket 'Socket.*socket'
mounted CharDevice 'a device of the host cannot be used in a VM'
mounted BlockDevice 'a device of the host cannot be used in a VM'
# Neither runtime has user namespaces on this kernel.
pod <<END
hostUsers: false
$container
END
until_true describes 'FailedCreatePodSandBox.*user namespace'
echo "hostUsers: as expected"
