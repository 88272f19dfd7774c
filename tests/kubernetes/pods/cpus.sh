# The static CPU manager gives a container one of the node's CPUs for itself. The container, or the VM that it is in, runs
# there only.
# Before 1.37, it gives none to a pod with resources of its own, and the API server completes an empty field.
RESOURCES=
pod <<END
terminationGracePeriodSeconds: 0
containers:
$(sleeper box 34567)
  resources: {requests: {cpu: "1", memory: 64Mi}, limits: {cpu: "1", memory: 64Mi}}
END
await condition=Ready
given() {
    python3 -c 'import json, sys
print(json.load(open("/run/node/kubelet/cpu_manager_state"))["entries"][sys.argv[1]]["box"])' "$(get '{.metadata.uid}')"
}
program='^sleep 34567'
[ "$CLASS" = runc ] || program=qemu-system-x86_64
# used prints the CPUs that the program's threads may run on.
used() { grep -h ^Cpus_allowed_list: /proc/"$(pgrep -f "$program")"/task/*/status | cut -f 2 | sort -u; }
alone() { [ "$(used)" = "$(given)" ]; }
until_true alone
given | grep -c '^[0-9]*$'
inside box nproc
