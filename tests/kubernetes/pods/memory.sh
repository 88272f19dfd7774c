# A pod can use the memory and the CPUs of its limits, and containers share one PID namespace if the pod says so.
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
inside big 'dd if=/dev/zero of=/dev/null bs=700M count=1 2>&1 | tail -n +3 | cut -d , -f 1; nproc; ps -o args | grep "^sleep" | sort'
kubectl get --raw "/api/v1/nodes/$NODE/proxy/stats/summary" | python3 -c 'import json, sys
pod = next(p for p in json.load(sys.stdin)["pods"] if p["podRef"]["name"] == sys.argv[1])
for name, value in [("pod", pod)] + sorted((c["name"], c) for c in pod["containers"]):
    print(name, "cpu", value["cpu"]["usageCoreNanoSeconds"] > 0, "memory", value["memory"]["workingSetBytes"] > 0)
print("network", pod["network"]["rxBytes"] > 0)' "$POD"
