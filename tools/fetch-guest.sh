#!/bin/sh
# Fetch what the guests of the tests are made of, a kernel for virtual machines and a busybox that needs no libraries,
# and unpack both into .cache/guest:  fetch-guest.sh [FOLDER]
#
# Installed as packages they would put a kernel into /boot and take the place of another busybox; unpacked they touch
# nothing. Where the system has both already nothing happens, unless a folder is named.
set -eu

folder=${1:-$(dirname "$0")/../.cache/guest}

has_kernel() {
    for image in /boot/vmlinuz-*-cloud-amd64; do
        [ ! -r "$image" ] || [ ! -e "/lib/modules/${image#/boot/vmlinuz-}/modules.builtin" ] || return 0
    done
    return 1
}

has_busybox() {
    [ -e /bin/busybox ] && ! grep -q /ld-linux /bin/busybox
}

[ ! -e "$folder" ] || exit 0
[ $# -gt 0 ] || ! has_kernel || ! has_busybox || exit 0
command -v apt-get >/dev/null && [ "$(dpkg --print-architecture)" = amd64 ] || exit 0

# The packages that the names of these today stand for; Ubuntu has the second.
kernel_packages() {
    for name in linux-image-cloud-amd64 linux-image-virtual; do
        found=$(apt-cache depends --recurse --important "$name" 2>/dev/null |
            sed -n 's/^ *Depends: \(linux-\(image\|modules\|binary\)-[0-9].*\)/\1/p' | sort -u)
        [ -z "$found" ] || { echo "$found" && return; }
    done
    return 1
}

download() {
    packages=$(kernel_packages) || return 1
    # shellcheck disable=SC2086  # one word a package
    (cd "$new" && apt-get download -qq -o APT::Sandbox::User="$(id -un)" $packages busybox-static)
}

echo "fetch-guest: fetching a kernel and a busybox for the guests of the tests"
mkdir -p "$(dirname "$folder")"
new=$(mktemp -d "$folder.XXXXXX")
trap 'rm -rf "$new"' EXIT
[ $# -gt 0 ] || echo '*' >"$(dirname "$folder")/.gitignore"
download 2>/dev/null || { apt-get update -qq && download; } || {
    echo "fetch-guest: that failed; the tests that need them will say so" >&2
    exit 0
}
mkdir "$new/root"
for package in "$new"/*.deb; do
    dpkg-deb -x "$package" "$new/root"
done
mv "$new/root" "$folder"
