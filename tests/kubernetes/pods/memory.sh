# A pod can use the memory and the CPUs of its limits, its containers share one PID namespace if it says so. The
# kubelet's statistics of the pod include the VM, and those of its containers do not.
pod <<END
terminationGracePeriodSeconds: 0
shareProcessNamespace: true
containers:
$(sleeper big)
  resources: {limits: {memory: 1Gi, cpu: "2"}, requests: {cpu: 100m}}
$(sleeper other 23456)
  resources: {limits: {memory: 64Mi, cpu: 100m}}
END
await condition=Ready
inside big 'dd if=/dev/zero of=/dev/null bs=700M count=1 2>&1 | head -n 1; [ $(nproc) -ge 2 ] && echo at least 2 CPUs
    ps -o args | grep "^sleep" | sort'
# The kubelet measures at intervals. `kubectl top pod` shows the sum of the containers in the resource metrics.
statistics() {
    kubectl get --raw "/api/v1/nodes/$NODE/proxy/stats/summary" >"$FILES/summary"
    kubectl get --raw "/api/v1/nodes/$NODE/proxy/metrics/resource" >"$FILES/metrics"
    python3 - "$POD" "$CLASS" "$FILES" <<'END'
import json, re, sys
name, runtime, files = sys.argv[1:]
MIB = 1 << 20
pod = next(p for p in json.load(open(files + "/summary"))["pods"] if p["podRef"]["name"] == name)
summary = {c["name"]: c for c in pod.get("containers", []) + [{**pod, "name": "pod"}]}
cpu = {n: c.get("cpu", {}).get("usageCoreNanoSeconds", 0) for n, c in summary.items()}
memory = {n: c.get("memory", {}).get("workingSetBytes", 0) for n, c in summary.items()}
metrics = {}
for metric, labels, value in re.findall(r"^(\w+)\{([^}]*)\} (\S+)", open(files + "/metrics").read(), re.M):
    labels = dict(re.findall(r'(\w+)="([^"]*)"', labels))
    if labels.get("pod") == name:
        metrics[metric.split("_", 1)[1], labels.get("container", "pod")] = float(value)
names = ["big", "other", "pod"]
top = {n: metrics.get(("memory_working_set_bytes", n), 0) for n in names}
print(cpu, memory, top, file=sys.stderr)
if not all(cpu.get(n) and memory.get(n) and top[n] and metrics.get(("cpu_usage_seconds_total", n)) for n in names):
    sys.exit(1)
print("CPU and memory of", *names)
for values in memory, top:
    outside = values["pod"] - values["big"] - values["other"]
    with_vm = outside < 16 * MIB if runtime == "runc" else outside > 48 * MIB
    # One sleeps, the other has given back what dd had.
    without_vm = values["big"] < 48 * MIB and values["other"] < 16 * MIB
    print("the pod with the VM:", with_vm, "its containers without the VM:", without_vm)
END
}
until_true statistics
