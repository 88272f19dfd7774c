# `kubectl top` shows what metrics-server has read from the kubelet: each container's CPU time and memory, without the VM.
pod <<END
terminationGracePeriodSeconds: 0
containers:
$(sleeper quiet)
- name: busy
  image: $BUSYBOX
  command: [sh, -c, "while :; do :; done"]
  resources: {limits: {cpu: 200m, memory: 64Mi}}
END
await condition=Ready
# A line is `POD CONTAINER 123m 4Mi`.
top() {
    kubectl top pod "$POD" --containers --no-headers >"$FILES/top" &&
        awk '$2 == "busy" && $3 + 0 >= 20 { busy = 1 } END { exit !(busy && NR == 2) }' "$FILES/top"
}
until_true top
cat "$FILES/top" >&2
awk '{ print $2, "at most 250m:", $3 + 0 <= 250, "at most 20m:", $3 + 0 <= 20, "less than 32 MiB:", $4 + 0 < 32 }' "$FILES/top" | sort
# The pod is the sum of its containers, under every runtime.
kubectl top pod "$POD" --no-headers | awk '{ print "pod, less than 48 MiB:", $3 + 0 < 48 }'
node() { kubectl top node "$NODE" --no-headers >"$FILES/node"; }
until_true node
awk '{ print $1, "has memory in use:", ($4 + 0 > 0) }' "$FILES/node"
