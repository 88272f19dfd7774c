# The API server accepts the manifests that install and remove husk.
kubectl create namespace husk-system >/dev/null 2>&1 || kubectl get namespace husk-system >/dev/null
for folder in install uninstall; do
    kubectl apply --validate=strict --dry-run=server -k "$REPOSITORY/setup/kubernetes/$folder" >"$FILES/applied"
    cut -d / -f 1 "$FILES/applied"
done
