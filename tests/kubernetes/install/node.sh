# What the steps of docs/kubernetes.md find on a node: containerd in one of the usual folders, and a systemctl that asks the
# test to restart it. No kube-proxy runs, so a rule leads to the API server.
mkdir -p /run/node/local/upper /run/node/local/work
mount -t overlay -o lowerdir=/usr/local,upperdir=/run/node/local/upper,workdir=/run/node/local/work node /usr/local
ln -s "$(command -v containerd)" /usr/local/bin/containerd
cat >/usr/local/bin/systemctl <<'END'
#!/bin/sh
[ "$*" = "restart containerd" ] || exit 1
: >/run/node/restart
while [ -e /run/node/restart ]; do sleep 0.1; done
END
chmod 0755 /usr/local/bin/systemctl
iptables -t nat -A PREROUTING -d 10.96.0.1 -p tcp --dport 443 -j DNAT --to-destination 127.0.0.1:6443
# The accounts' controller makes the one that pods need.
until_true kubectl get serviceaccount default >/dev/null 2>&1
# What the node's containers have to run through.
pod <<END
containers:
$(sleeper box)
END
await condition=Ready
