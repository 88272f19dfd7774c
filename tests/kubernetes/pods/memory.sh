# A pod can use the memory and the CPUs of its limits, its containers share one PID namespace if it says so, and the
# kubelet's summary has their statistics.
pod <<END
terminationGracePeriodSeconds: 0
shareProcessNamespace: true
containers:
- name: big
  image: $BUSYBOX
  command: [sleep, "100000"]
  resources: {limits: {memory: 1Gi, cpu: "2"}, requests: {cpu: 100m}}
- name: other
  image: $BUSYBOX
  command: [sleep, "23456"]
  resources: {limits: {memory: 64Mi, cpu: 100m}}
END
await condition=Ready
inside big 'dd if=/dev/zero of=/dev/null bs=700M count=1 2>&1 | head -n 1; [ $(nproc) -ge 2 ] && echo at least 2 CPUs
    ps -o args | grep "^sleep" | sort'
summary() {
    kubectl get --raw "/api/v1/nodes/$NODE/proxy/stats/summary" | python3 -c 'import json, sys
pod = next(p for p in json.load(sys.stdin)["pods"] if p["podRef"]["name"] == sys.argv[1])
measured = {}
for container in pod.get("containers", []):
    measured[container["name"] + " CPU"] = container["cpu"]["usageCoreNanoSeconds"] > 0
    measured[container["name"] + " memory"] = container["memory"]["workingSetBytes"] > 0
# The kubelet measures at intervals.
sys.exit(not (len(measured) == 4 and all(measured.values()) and [print(*sorted(measured), sep=", ")]))' "$POD"
}
until_true summary
