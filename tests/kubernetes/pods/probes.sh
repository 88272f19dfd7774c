# A failing liveness probe restarts its container, after its preStop hook; a container that exits restarts; postStart
# hooks, TCP, HTTP and gRPC probes work.
pod <<END
terminationGracePeriodSeconds: 5
containers:
- name: liveness
  image: $BUSYBOX
  command: [sh, -c, "echo started >>/files/liveness; trap 'echo TERM >>/files/liveness; exit 5' TERM; [ -e /files/healthy ] || touch /files/healthy; sleep 100000 & wait"]
  lifecycle:
    postStart: {exec: {command: [sh, -c, "echo postStart >>/files/hook"]}}
    preStop: {exec: {command: [sh, -c, "echo preStop >>/files/liveness"]}}
  livenessProbe: {exec: {command: [test, -e, /files/healthy]}, initialDelaySeconds: 5, periodSeconds: 2, timeoutSeconds: 20, failureThreshold: 1}
  volumeMounts: [{name: files, mountPath: /files}]
- name: exits
  image: $BUSYBOX
  command: [sh, -c, "[ -e /files/once ] && exec sleep 100000; touch /files/once; exit 4"]
  volumeMounts: [{name: files, mountPath: /files}]
- name: web
  image: $NGINX
  startupProbe: {tcpSocket: {port: 80}, periodSeconds: 1, timeoutSeconds: 20, failureThreshold: 60}
  livenessProbe: {httpGet: {port: 80}, periodSeconds: 2, timeoutSeconds: 20}
- name: checked
  image: $HEALTH
  command: [health, "5000", /files/serving]
  startupProbe: {tcpSocket: {port: 5000}, periodSeconds: 1, timeoutSeconds: 20, failureThreshold: 60}
  readinessProbe: {grpc: {port: 5000, service: any}, periodSeconds: 1, timeoutSeconds: 20, failureThreshold: 1}
  volumeMounts: [{name: files, mountPath: /files}]
volumes: [{name: files, hostPath: {path: $FILES}}]
END
await "jsonpath={.status.containerStatuses[?(@.name=='checked')].started}=true"
get '{.status.containerStatuses[?(@.name=="checked")].ready}'
touch "$FILES/serving"
await condition=Ready
rm "$FILES/serving"
await condition=Ready=false
touch "$FILES/serving"
await condition=Ready
rm "$FILES/healthy"
await "jsonpath={.status.containerStatuses[?(@.name=='liveness')].restartCount}=1"
await "jsonpath={.status.containerStatuses[?(@.name=='exits')].restartCount}=1"
await condition=Ready
get '{range .status.containerStatuses[*]}{.name}: {.restartCount} {.lastState.terminated.exitCode} {.lastState.terminated.reason}{"\n"}{end}'
cat "$FILES/liveness"
sort -u "$FILES/hook"
kubectl get events --field-selector "involvedObject.name=$POD" -o custom-columns=R:.reason --no-headers | sort -u | tr '\n' ' '
