# Users, capabilities, seccomp, no_new_privs and read-only root filesystems are as the pod says.
show='grep -E "^(Uid|Gid|Groups|CapPrm|CapEff|NoNewPrivs|Seccomp):" /proc/self/status | tr -s "\t " " "; touch /x 2>&1 || :'
pod <<END
terminationGracePeriodSeconds: 0
containers:
$(sleeper plain)
$(sleeper unconfined)
  securityContext: {seccompProfile: {type: Unconfined}}
$(sleeper strict)
  securityContext:
    runAsUser: 1000
    runAsGroup: 2000
    allowPrivilegeEscalation: false
    readOnlyRootFilesystem: true
    capabilities: {drop: [ALL], add: [NET_BIND_SERVICE]}
    seccompProfile: {type: RuntimeDefault}
END
await condition=Ready
for container in plain unconfined strict; do
    echo "$container"
    inside "$container" "$show"
done
