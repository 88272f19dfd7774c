# An ephemeral container sees the processes of its target.
pod <<END
terminationGracePeriodSeconds: 0
containers:
$(sleeper box 12345)
END
await condition=Ready
kubectl debug "$POD" --profile=general --image "$BUSYBOX" --target box -c debugger -- sh -c 'ps -o args | grep "^sleep"; ls /proc/1/root/etc/group' >/dev/null 2>&1
await "jsonpath={.status.ephemeralContainerStatuses[0].state.terminated.exitCode}=0"
kubectl logs "$POD" -c debugger
