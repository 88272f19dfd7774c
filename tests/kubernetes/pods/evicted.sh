# The kubelet evicts a pod that uses more of the node's disk than it may: in a volume, and in a container's root
# filesystem.
evicted() {
    await "jsonpath={.status.reason}=Evicted"
    get '{.status.phase}: {.status.message}'
    kubectl delete pod "$POD" --timeout=120s >/dev/null
}
pod <<END
terminationGracePeriodSeconds: 1
containers:
- name: box
  image: $BUSYBOX
  command: [sh, -c, "dd if=/dev/zero of=/disk/file bs=1M count=8; sleep 100000"]
  volumeMounts: [{name: disk, mountPath: /disk}]
volumes: [{name: disk, emptyDir: {sizeLimit: 2Mi}}]
END
evicted
pod <<END
terminationGracePeriodSeconds: 1
containers:
- name: box
  image: $BUSYBOX
  command: [sh, -c, "dd if=/dev/zero of=/file bs=1M count=8; sleep 100000"]
  resources: {limits: {ephemeral-storage: 2Mi}}
END
evicted
