# The limits of a running pod change in place, without a restart: within the VM's size, and beyond it on a board that can
# grow. Elsewhere the limits stay, and an event says what the VM has, or, in Kubernetes 1.34, the pod's condition. runc has no
# such size.
RESOURCES='{}'
# box MEMORY CPUS creates a pod with a container with these limits.
box() {
    pod <<END
terminationGracePeriodSeconds: 1
containers:
$(sleeper box)
  resources: {requests: {cpu: 500m, memory: 32Mi}, limits: {memory: $1, cpu: "$2"}}
END
    await condition=Ready
}
# resize MEMORY CPUS
resize() {
    kubectl patch pod "$POD" --subresource resize --patch \
        '{"spec": {"containers": [{"name": "box", "resources": {"limits": {"memory": "'"$1"'", "cpu": "'"$2"'"}}}]}}' >/dev/null
}
# resized MEMORY CPUS waits for a change, and prints what the container sees.
resized() {
    resize "$1" "$2"
    await "jsonpath={.status.containerStatuses[0].resources.limits.memory}=$1"
    await "jsonpath={.status.containerStatuses[0].resources.limits.cpu}=$2"
    get '{.status.containerStatuses[0].resources.limits} restarts: {.status.containerStatuses[0].restartCount}'
    inside box 'cd /sys/fs/cgroup; cat memory.max 2>/dev/null || cat memory/memory.limit_in_bytes
        cat cpu.max 2>/dev/null || echo $(cat cpu/cpu.cfs_quota_us cpu/cpu.cfs_period_us)'
}
in_condition() { get '{.status.conditions[?(@.type=="PodResizeInProgress")].message}' | grep -q "$1"; }
explains() { describes "$1" || in_condition "$1"; }
box 64Mi 500m
resized 128Mi 700m
resized 96Mi 600m
if [ "$CLASS" != runc ]; then
    resize 2Gi 600m
    until_true explains 'VM.* has 512 MiB'
    inside box 'cat /sys/fs/cgroup/memory.max' | grep -qx $((96 << 20))
fi
kubectl delete pod "$POD" --timeout=120s >/dev/null
# A board that grows.
[ "$CLASS" = runc ] || CLASS=$CLASS-q35
box 64Mi 500m
resized 1Gi 500m
inside box 'dd if=/dev/zero of=/dev/null bs=700M count=1 2>&1 | head -n 1'
