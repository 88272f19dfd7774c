# A raw block volume is a device of the container: what it writes there is on the node's device.
truncate -s 16M "$FILES/disk"
device=$(losetup --find --show "$FILES/disk")
trap 'losetup --detach "$device"' EXIT
kubectl apply -f - >/dev/null <<END
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: $POD}
spec: {accessModes: [ReadWriteOnce], volumeMode: Block, storageClassName: "", volumeName: $POD, resources: {requests: {storage: 16Mi}}}
END
# No controller binds the claim. The kubelet requires the capacity.
claim=$(kubectl get persistentvolumeclaim "$POD" -o jsonpath='{.metadata.uid}')
kubectl apply -f - >/dev/null <<END
apiVersion: v1
kind: PersistentVolume
metadata: {name: $POD}
spec:
  capacity: {storage: 16Mi}
  accessModes: [ReadWriteOnce]
  volumeMode: Block
  local: {path: $device}
  claimRef: {namespace: default, name: $POD, uid: $claim}
  nodeAffinity: {required: {nodeSelectorTerms: [{matchExpressions: [{key: kubernetes.io/hostname, operator: In, values: [$NODE]}]}]}}
END
kubectl patch persistentvolumeclaim "$POD" --subresource status --type merge --patch '{"status": {"phase": "Bound", "capacity": {"storage": "16Mi"}}}' >/dev/null
pod <<END
terminationGracePeriodSeconds: 0
containers:
$(sleeper box)
  volumeDevices: [{name: disk, devicePath: /dev/disk}]
volumes: [{name: disk, persistentVolumeClaim: {claimName: $POD}}]
END
await condition=Ready
inside box 'stat -c "%F %a %u %g" /dev/disk; wc -c </dev/disk
    echo written | dd of=/dev/disk bs=512 seek=3 conv=sync,fsync 2>&1 | head -n 1'
dd if="$FILES/disk" bs=512 skip=3 count=1 2>/dev/null | head -n 1
kubectl delete pod "$POD" --timeout=120s >/dev/null
for object in persistentvolumeclaim persistentvolume; do
    kubectl patch $object "$POD" --patch '{"metadata": {"finalizers": null}}' >/dev/null
    kubectl delete $object "$POD" --timeout=30s >/dev/null
done
