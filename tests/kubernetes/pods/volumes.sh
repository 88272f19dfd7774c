# Every kind of volume has its content, owner, mode and size, and follows updates, which programs notice. A read-only mount
# is recursive only if the pod says so.
kubectl create configmap "$POD" --from-literal=key=old >/dev/null
kubectl create secret generic "$POD" --from-literal=password=secret >/dev/null
mkdir -p "$FILES/folder/below"
mount -t tmpfs below "$FILES/folder/below"
echo a file >"$FILES/file"
pod <<END
terminationGracePeriodSeconds: 0
securityContext: {fsGroup: 4321}
containers:
$(sleeper box)
  env: [{name: APP, valueFrom: {fieldRef: {fieldPath: "metadata.labels['app']"}}}]
  volumeMounts:
  - {name: disk, mountPath: /disk}
  - {name: disk, mountPath: /expression, subPathExpr: "sub-\$(APP)"}
  - {name: memory, mountPath: /memory}
  - {name: config, mountPath: /config}
  - {name: config, mountPath: /key, subPath: key}
  - {name: secret, mountPath: /secret}
  - {name: downward, mountPath: /downward}
  - {name: host, mountPath: /host}
  - {name: host, mountPath: /read-only, readOnly: true}
  - {name: host, mountPath: /all-read-only, readOnly: true, recursiveReadOnly: Enabled}
  - {name: made, mountPath: /made}
  - {name: empty, mountPath: /empty}
  - {name: file, mountPath: /file}
  - {name: image, mountPath: /image}
- name: watcher
  image: $WATCH
  command: [watch, /config]
  volumeMounts: [{name: config, mountPath: /config}]
volumes:
- {name: disk, emptyDir: {}}
- {name: memory, emptyDir: {medium: Memory, sizeLimit: 16Mi}}
- {name: config, configMap: {name: $POD}}
- {name: secret, secret: {secretName: $POD, defaultMode: 0400}}
- name: downward
  downwardAPI: {items: [{path: labels, fieldRef: {fieldPath: metadata.labels}}]}
- {name: host, hostPath: {path: $FILES/folder, type: Directory}}
- {name: file, hostPath: {path: $FILES/file, type: File}}
- {name: made, hostPath: {path: $FILES/made, type: DirectoryOrCreate}}
- {name: empty, hostPath: {path: $FILES/empty, type: FileOrCreate}}
- {name: image, image: {reference: "gcr.io/k8s-staging-cri-tools/test-image-1:latest"}}
END
await condition=Ready
inside box 'id -G; stat -c "%n %u %g %a" /disk /expression /memory /config/key /secret/password /host /file
    cat /config/key /key; echo; cat /secret/password /downward/labels; echo; cat /file /image/test
    df /memory | tail -n 1 | tr -s " " | cut -d " " -f 2
    echo x >/disk/x; ls /disk
    for folder in /read-only /read-only/below /all-read-only /all-read-only/below /image; do
        touch $folder/x 2>&1 && echo "$folder can be written"
    done
    stat -c "%n %F %u %g %a %s" /made /empty; echo x >/made/x; echo x >/empty
    echo y >/host/y; chown 7:8 /host/y; echo z >>/file; ls /var/run/secrets/kubernetes.io/serviceaccount'
stat -c '%u %g' "$FILES/folder/y"
cat "$FILES/file"
get '{.status.containerStatuses[0].volumeMounts[?(@.mountPath=="/all-read-only")].recursiveReadOnly}'
cat "$FILES/made/x" "$FILES/empty"
until_true logged watcher watching
kubectl patch configmap "$POD" -p '{"data":{"key":"new"}}' >/dev/null
inside box 'n=0; until grep -q new /config/key; do n=$((n + 1)); [ $n -lt 240 ] || exit 1; sleep 0.5; done; cat /config/key /key'
echo
until_true logged watcher ..data
kubectl delete configmap,secret "$POD" >/dev/null
kubectl delete pod "$POD" --timeout=120s >/dev/null
umount "$FILES/folder/below"
