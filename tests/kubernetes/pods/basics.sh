# An init container, a native sidecar and two containers start in this order. kubectl logs, exec, cp, attach and
# port-forward reach them.
pod <<END
terminationGracePeriodSeconds: 3
initContainers:
- name: init
  image: $BUSYBOX
  command: [sh, -c, "echo from init >/data/order; echo init has run"]
  volumeMounts: [{name: data, mountPath: /data}]
- name: sidecar
  image: $BUSYBOX
  restartPolicy: Always
  command: [sh, -c, "echo from sidecar >>/data/order; sleep 100000"]
  startupProbe: {exec: {command: [grep, sidecar, /data/order]}, periodSeconds: 1, timeoutSeconds: 20, failureThreshold: 60}
  volumeMounts: [{name: data, mountPath: /data}]
containers:
- name: web
  image: $NGINX
  ports: [{containerPort: 80, hostPort: 18000}]
  readinessProbe: {httpGet: {port: 80}, periodSeconds: 1, timeoutSeconds: 20}
- name: box
  image: $BUSYBOX
  command: [sh, -c, "cat /data/order; i=0; while :; do i=\$((i + 1)); echo tick \$i; sleep 1; done"]
  volumeMounts: [{name: data, mountPath: /data}]
volumes: [{name: data, emptyDir: {}}]
END
await condition=Ready
get '{.status.phase} {.status.initContainerStatuses[0].state.terminated.exitCode} {.status.initContainerStatuses[1].started}'
kubectl get pod "$POD" --no-headers | awk '{ print $2, $3, $4 }'
echo "logs: $(kubectl logs "$POD" -c init)"
timeout 60 kubectl logs -f "$POD" -c box | sed 4q
echo "exec: $(inside box 'echo out; echo err >&2; exit 3' 2>"$FILES/err" || echo "exit code $?"; cat "$FILES/err")"
echo "stdin: $(echo typed | kubectl exec -i "$POD" -c box -- cat)"
# The terminal also shows script's end of input, if it arrives in time.
echo "terminal: $(script -qec "kubectl exec -it $POD -c box -- tty" /dev/null | grep -ao '/dev/pts/[0-9]*')"
echo data >"$FILES/there"
kubectl cp "$FILES/there" "$POD:/data/there" -c box
kubectl cp "$POD:/data/there" "$FILES/back" -c box >/dev/null
echo "cp: $(inside box 'cat /data/there') $(cat "$FILES/back")"
timeout 60 kubectl attach "$POD" -c box 2>/dev/null | sed -n '2{s/[0-9]*$/N/p;q}'
echo "in the pod: $(inside box 'wget -q -O- http://127.0.0.1/')"
echo "pod's address: $(fetch "http://$(get '{.status.podIP}')/")"
echo "host port: $(fetch http://127.0.0.1:18000/)"
mkfifo "$FILES/forward"
kubectl port-forward "pod/$POD" :80 >"$FILES/forward" 2>&1 &
exec 3<"$FILES/forward"
# Forwarding from 127.0.0.1:PORT -> 80
read -r line <&3
port=${line#*:} port=${port%% *}
echo "port-forward: $(fetch "http://127.0.0.1:$port/")"
kill $!
echo "host name: $(inside box hostname)"
echo "DNS: $(inside box 'sort /etc/resolv.conf')"
echo "hosts: $(inside box 'grep -c $(hostname) /etc/hosts')"
