# A deleted pod gets its preStop hook, then SIGTERM, and after its grace period SIGKILL. A native sidecar ends after the
# containers.
pod <<END
terminationGracePeriodSeconds: 8
initContainers:
- name: sidecar
  image: $BUSYBOX
  restartPolicy: Always
  command: [sh, -c, "trap 'echo sidecar >>/files/order; exit 0' TERM; echo ready >>/files/sidecar; sleep 100000 & wait"]
  volumeMounts: [{name: files, mountPath: /files}]
containers:
- name: quick
  image: $BUSYBOX
  command: [sh, -c, "trap 'echo TERM >>/files/quick; echo quick >>/files/order; exit 0' TERM; echo ready >>/files/quick; sleep 100000 & wait"]
  lifecycle: {preStop: {exec: {command: [sh, -c, "echo preStop >>/files/quick"]}}}
  volumeMounts: [{name: files, mountPath: /files}]
- name: stubborn
  image: $BUSYBOX
  command: [sh, -c, "trap 'echo TERM >>/files/stubborn' TERM; echo ready >>/files/stubborn; while :; do sleep 1; done"]
  volumeMounts: [{name: files, mountPath: /files}]
volumes: [{name: files, hostPath: {path: $FILES}}]
END
await condition=Ready
until_true test -e "$FILES/sidecar"
until_true test -e "$FILES/quick"
until_true test -e "$FILES/stubborn"
kubectl delete pod "$POD" --timeout=120s
cat "$FILES/quick" "$FILES/stubborn" "$FILES/order"
