# Writes images as OCI layouts (image-spec 1.0), reproducibly: entries are sorted, owners numeric, timestamps 0. Source
# this file after setting $work to a folder for temporary files, in which $work/layout becomes the image.

mkdir -p "$work/layout/blobs/sha256"

pack() { tar --create --format=gnu --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner "$@"; }

# blob FILE moves the file to its digest's name and prints digest and size.
blob() {
    digest=$(sha256sum <"$1" | cut -d ' ' -f 1)
    size=$(stat -c %s "$1")
    mv "$1" "$work/layout/blobs/sha256/$digest"
    printf 'sha256:%s %s\n' "$digest" "$size"
}

descriptor() { printf '{"mediaType":"application/vnd.oci.image.%s","digest":"%s","size":%s' "$@"; }

# image FILE NAME CONFIG LAYER... writes the image with these layers, which are archives. NAME ends with a tag; CONFIG is
# the JSON object of the image's `config`.
image() {
    local file="$1" name="$2" settings="$3" layers= ids= layer config manifest
    shift 3
    for layer in "$@"; do
        layer=$(blob "$layer")
        layers="$layers${layers:+,}$(descriptor layer.v1.tar $layer)}"
        ids="$ids${ids:+,}\"${layer% *}\""
    done
    printf '{"created":"1970-01-01T00:00:00Z","architecture":"amd64","os":"linux","config":%s,"rootfs":{"type":"layers","diff_ids":[%s]}}' \
        "$settings" "$ids" >"$work/config"
    config=$(blob "$work/config")
    printf '{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":%s},"layers":[%s]}' \
        "$(descriptor config.v1+json $config)" "$layers" >"$work/manifest"
    manifest=$(blob "$work/manifest")
    printf '{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[%s,"platform":{"architecture":"amd64","os":"linux"},"annotations":{"io.containerd.image.name":"%s","org.opencontainers.image.ref.name":"%s"}}]}' \
        "$(descriptor manifest.v1+json $manifest)" "$name" "${name##*:}" >"$work/layout/index.json"
    printf '{"imageLayoutVersion":"1.0.0"}' >"$work/layout/oci-layout"
    find "$work/layout" -type d -exec chmod 0755 {} +
    find "$work/layout" -type f -exec chmod 0644 {} +
    mkdir -p "$(dirname "$file")"
    pack --directory "$work/layout" --file "$file.new" blobs index.json oci-layout
    mv "$file.new" "$file"
}
