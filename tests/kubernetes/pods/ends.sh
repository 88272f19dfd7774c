# Exit codes, termination messages and OOM kills are in the pod's status.
pod <<END
restartPolicy: Never
containers:
- name: file
  image: $BUSYBOX
  command: [sh, -c, "echo last words >/dev/termination-log; exit 7"]
- name: log
  image: $BUSYBOX
  terminationMessagePolicy: FallbackToLogsOnError
  command: [sh, -c, "echo last output; exit 8"]
- name: memory
  image: $BUSYBOX
  command: [sh, -c, "exec tail -c 200000000 /dev/zero"]
  resources: {limits: {memory: 32Mi}}
- name: well
  image: $BUSYBOX
  command: ["true"]
END
await "jsonpath={.status.phase}=Failed"
get '{range .status.containerStatuses[*]}{.name}: {.state.terminated.exitCode} {.state.terminated.reason} {.state.terminated.message}{"\n"}{end}'
