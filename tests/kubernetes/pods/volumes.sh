# Every kind of volume has its content, owner, mode and size, and follows updates.
kubectl create configmap "$POD" --from-literal=key=old >/dev/null
kubectl create secret generic "$POD" --from-literal=password=secret >/dev/null
mkdir -p "$FILES/folder"
echo a file >"$FILES/file"
pod <<END
terminationGracePeriodSeconds: 0
securityContext: {fsGroup: 4321}
containers:
- name: box
  image: $BUSYBOX
  command: [sleep, "100000"]
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
  - {name: file, mountPath: /file}
  - {name: image, mountPath: /image}
volumes:
- {name: disk, emptyDir: {}}
- {name: memory, emptyDir: {medium: Memory, sizeLimit: 16Mi}}
- {name: config, configMap: {name: $POD}}
- {name: secret, secret: {secretName: $POD, defaultMode: 0400}}
- name: downward
  downwardAPI: {items: [{path: labels, fieldRef: {fieldPath: metadata.labels}}]}
- {name: host, hostPath: {path: $FILES/folder, type: Directory}}
- {name: file, hostPath: {path: $FILES/file, type: File}}
- {name: image, image: {reference: "gcr.io/k8s-staging-cri-tools/test-image-1:latest"}}
END
await condition=Ready
inside box 'id -G; stat -c "%n %u %g %a" /disk /expression /memory /config/key /secret/password /host /file
    cat /config/key /key; echo; cat /secret/password /downward/labels; echo; cat /file /image/test
    df /memory | tail -n 1 | tr -s " " | cut -d " " -f 2
    echo x >/disk/x; ls /disk; touch /read-only/x 2>&1 || :; touch /image/x 2>&1 || :
    echo y >/host/y; chown 7:8 /host/y; echo z >>/file; ls /var/run/secrets/kubernetes.io/serviceaccount'
stat -c '%u %g' "$FILES/folder/y"
cat "$FILES/file"
kubectl patch configmap "$POD" -p '{"data":{"key":"new"}}' >/dev/null
inside box 'n=0; until grep -q new /config/key; do n=$((n + 1)); [ $n -lt 240 ] || exit 1; sleep 0.5; done; cat /config/key /key'
echo
kubectl delete configmap,secret "$POD" >/dev/null
