# What the node mounts later below a volume appears in a container with HostToContainer propagation, and disappears with
# the node's mount. Without propagation, it does not appear.
mkdir -p "$FILES/folder/later"
mount --bind "$FILES/folder" "$FILES/folder"
mount --make-shared "$FILES/folder"
pod <<END
terminationGracePeriodSeconds: 0
containers:
$(sleeper box)
  volumeMounts:
  - {name: files, mountPath: /follows, mountPropagation: HostToContainer}
  - {name: files, mountPath: /stays}
volumes: [{name: files, hostPath: {path: $FILES/folder}}]
END
await condition=Ready
mount -t tmpfs later "$FILES/folder/later"
echo text >"$FILES/folder/later/file"
until_true inside box 'cat /follows/later/file' 2>/dev/null
inside box 'ls /stays/later'
# A VM has the mount for a moment after its last use.
until_true umount "$FILES/folder/later" 2>/dev/null
until_true inside box '[ -z "$(ls /follows/later)" ]'
inside box 'ls /follows'
kubectl delete pod "$POD" --timeout=120s >/dev/null
umount "$FILES/folder"
