# The commands of docs/kubernetes.md: a DaemonSet installs husk, the page's pod runs, and a DaemonSet removes husk while a pod
# still needs it, and then completely. Another pod of the node runs all the time.
manifests=$FILES/kubernetes
cp -r "$REPOSITORY/setup/kubernetes" "$manifests"
[ "$CLASS" != husk-shim ] ||
    sed -i 's#node, install,#& --sandboxer, shim,#' "$manifests/install/daemonset.yaml"
# found prints what the installation may change.
found() {
    find /etc/containerd /etc/husk /opt /run/husk -printf '%p %y %m %U:%G %l\n' 2>/dev/null | sort
    cat /etc/containerd/config.toml
    kubectl get node "$NODE" -o jsonpath='{.metadata.labels}'
}
label() { kubectl get node "$NODE" -o jsonpath='{.metadata.labels.io\.husk/runtime}'; }
container() { kubectl get pod other -o jsonpath='{.status.containerStatuses[0].containerID}'; }
# roll COMMAND waits until the DaemonSet's pod is ready.
roll() { kubectl --namespace husk-system rollout status "daemonset/husk-$1" --timeout=300s >&2; }
# says COMMAND TEXT succeeds if the pod's step COMMAND has printed it.
says() { kubectl --namespace husk-system logs "daemonset/husk-$1" --container "$1" 2>&1 | grep -qF "$2"; }
found >"$FILES/before"
other=$(container)

ctr --address /run/node/containerd.sock --namespace k8s.io image import "$IMAGE" >&2
# Before the installation, no node is one for the class.
kubectl apply -f "$manifests/install/runtimeclass.yaml" >&2
# The pod of the page.
awk '/^## Use/ { use = 1 } /^```$/ { yaml = 0 } yaml && use; /^```yaml/ { yaml = 1 } /^## Size/ { exit }' \
    "$REPOSITORY/docs/kubernetes.md" >"$FILES/demo"
kubectl apply -f "$FILES/demo" >&2
kubectl wait --for=jsonpath='{.status.conditions[?(@.type=="PodScheduled")].reason}'=Unschedulable pod/demo --timeout=60s >&2

kubectl apply -k "$manifests/install" >&2
roll install
[ "$(label)" = true ]
says install "installed in /opt/husk, registered in /etc/containerd/config.toml"
containerd config dump | grep -A 3 'runtimes.husk\]' >&2
kubectl wait --for=condition=Ready pod/demo --timeout=240s >&2
kubectl exec demo -- uname -r | grep husk >&2
id=$(crictl --config /run/node/crictl.yaml pods --name demo -q)
/opt/husk/husk list | grep -F "$id" >&2
/opt/husk/husk status "$id" >&2
[ -n "$(/opt/husk/husk logs "$id" | tee /dev/stderr)" ]

# husk stays while a pod needs it.
kubectl delete -k "$manifests/install" >&2
kubectl apply -k "$manifests/uninstall" >&2
until_true says uninstall "delete all pods and containers of husk on this node first"
[ -z "$(label)" ]
kubectl exec demo -- true
kubectl delete pod demo --timeout=120s >&2
roll uninstall
kubectl delete -k "$manifests/uninstall" >&2
found >"$FILES/after"
diff "$FILES/before" "$FILES/after" >&2
[ "$(container)" = "$other" ]
kubectl delete pod other --timeout=120s >&2
