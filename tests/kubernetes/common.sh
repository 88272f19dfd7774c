# Functions of the scripts in `pods`, `install` and `stress`. A script in `pods` prints what must be the same under runc and
# under husk, for the pod named $POD with the RuntimeClass $CLASS on $NODE. It ends at the first command that fails. The pod
# is deleted afterwards.

BUSYBOX=registry.k8s.io/e2e-test-images/busybox:1.29-2
NGINX=registry.k8s.io/e2e-test-images/nginx:1.14-2
# Answers gRPC health checks; see tests/kubernetes/images/health.go.
HEALTH=registry.k8s.io/husk-tests/health:latest
# Prints what is moved into a folder; see tests/kubernetes/images/watch.c.
WATCH=registry.k8s.io/husk-tests/watch:latest
# Files of the node, for this pod.
FILES=/run/node/files/$POD
mkdir -p "$FILES"
# The pod's own resources, or nothing. Without a request, its share of a busy machine's CPUs would be next to nothing.
RESOURCES='{requests: {cpu: 500m}}'

# pod creates the pod; its spec, in YAML, comes from stdin, and $ANNOTATIONS may have more annotations.
pod() {
    {
        printf 'apiVersion: v1\nkind: Pod\nmetadata: {name: %s, labels: {app: test}, annotations: {color: green%s}}\n' \
            "$POD" "${ANNOTATIONS:+, $ANNOTATIONS}"
        printf 'spec:\n  runtimeClassName: %s\n  nodeName: %s\n' "$CLASS" "$NODE"
        [ -z "$RESOURCES" ] || printf '  resources: %s\n' "$RESOURCES"
        sed 's/^/  /'
    } | kubectl apply -f - >/dev/null
}
# sleeper NAME [SECONDS] prints a container that sleeps, to which more fields can be added.
sleeper() { printf -- '- name: %s\n  image: %s\n  command: [sleep, "%s"]\n' "$1" "$BUSYBOX" "${2:-100000}"; }
# await CONDITION, as `kubectl wait --for` takes it.
await() { kubectl wait --for="$1" "pod/$POD" --timeout=240s >/dev/null; }
# get JSONPATH prints a part of the pod.
get() {
    kubectl get pod "$POD" -o jsonpath="$1"
    echo
}
# describes PATTERN succeeds if kubectl describe prints it.
describes() { kubectl describe pod "$POD" | grep -q "$1"; }
# logged CONTAINER LINE succeeds if the container has printed it.
logged() { kubectl logs "$POD" -c "$1" | grep -qFx "$2"; }
# inside CONTAINER SCRIPT runs a script in a container.
inside() { kubectl exec "$POD" -c "$1" -- sh -c "$2"; }
# fetch URL
fetch() {
    python3 -c 'import sys, urllib.request as u
print(u.build_opener(u.ProxyHandler({})).open(sys.argv[1], timeout=20).read().decode().strip())' "$1"
}
# until_true COMMAND... repeats a command until it succeeds, for what no `kubectl wait` reports. $TRIES replaces the number
# of tries, two a second.
until_true() {
    tries=0
    until "$@"; do
        tries=$((tries + 1))
        [ $tries -lt "${TRIES:-240}" ] || { echo "failed for too long: $*" >&2; return 1; }
        sleep 0.5
    done
}
