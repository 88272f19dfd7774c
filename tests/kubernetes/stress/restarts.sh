# Twenty containers of a pod are restarted ten times each. After that, the shim and the VM have no more open files, mounts,
# cgroups and processes than before.
containers=20 restarts=10
ANNOTATIONS='io.husk.debug: "true"'
{
    echo "terminationGracePeriodSeconds: 0"
    echo "containers:"
    # The third start of each waits for the file `go`; the last one stays.
    for number in $(seq $containers); do
        cat <<END
- name: box-$number
  image: $BUSYBOX
  command:
  - sh
  - -c
  - >-
    echo x >>/data/$number; n=\$(wc -l </data/$number);
    while [ \$n = 3 ] && [ ! -e /data/go ]; do sleep 1; done;
    [ \$n -lt $((restarts + 3)) ] && exit 3; exec sleep 100000
  volumeMounts: [{name: data, mountPath: /data}]
END
    done
    echo "volumes: [{name: data, emptyDir: {}}]"
} >"$FILES/spec"
pod <"$FILES/spec"

# have COUNT succeeds if every container has been restarted so often, at least, and runs.
have() {
    get '{range .status.containerStatuses[*]}{.restartCount} {.state.running.startedAt}{"\n"}{end}' |
        awk -v restarts="$1" '$1 >= restarts && NF == 2 { n++ } END { exit n != '$containers' }'
}
sandbox() { crictl --config /run/node/crictl.yaml pods --name "$POD" -q; }
# count prints what must not grow. On the node, only the daemons run besides the pod's processes.
count() {
    for pid in $(pgrep -f 'containerd-shim-|qemu-system|virtiofsd'); do ls "/proc/$pid/fd"; done | wc -l
    wc -l </proc/1/mountinfo
    find /sys/fs/cgroup -type d -path "*pod$(get '{.metadata.uid}')*" | wc -l
    [ "$CLASS" != runc ] || return 0
    husk exec "$(sandbox)" -- sh -c '
        ls /proc/1/fd | wc -l; wc -l </proc/1/mountinfo; find /sys/fs/cgroup -type d | wc -l; ls -d /proc/[0-9]* | wc -l'
}
TRIES=2400
until_true have 2
count >"$FILES/before"
inside box-1 'touch /data/go'
until_true have $((restarts + 2))
count >"$FILES/after"
names="open files,mounts on the node,cgroups on the node,open files of the VM's init,mounts in the VM,cgroups in the VM,processes in the VM"
paste "$FILES/before" "$FILES/after" | awk -v names="$names" '
    BEGIN { split(names, name, ",") }
    { print "  " name[NR] ": " $1 ", then " $2; if ($2 > $1 + 5) failed = 1 }
    END { exit failed }'
