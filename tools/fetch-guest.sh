#!/bin/sh
# Fetch what the guests of the tests are made of, a kernel for virtual machines, a busybox that needs no libraries and
# QEMU's guest agent with its libraries, and unpack them into .cache/guest:  fetch-guest.sh [FOLDER]
#
# Installed as packages they would put a kernel into /boot, take the place of another busybox and start a service;
# unpacked they touch nothing. What the system has is not fetched, unless a folder is named.
set -eu

folder=${1:-$(dirname "$0")/../.cache/guest}
named=${1:+yes}

# Whether a folder holds a part; of the system's kernels only those that are made for virtual machines count.
has_kernel() {
    for image in "$1"/boot/vmlinuz-*${2:-}; do
        for modules in "$1/lib/modules" "$1/usr/lib/modules"; do
            [ ! -r "$image" ] || [ ! -e "$modules/${image#"$1"/boot/vmlinuz-}/modules.builtin" ] || return 0
        done
    done
    return 1
}

has_busybox() {
    for busybox in "$1/bin/busybox" "$1/usr/bin/busybox"; do
        [ ! -e "$busybox" ] || grep -q /ld-linux "$busybox" || return 0
    done
    return 1
}

has_agent() {
    [ -e "$1/usr/sbin/qemu-ga" ]
}

missing() {
    for part in kernel busybox agent; do
        "has_$part" "$folder" || { [ -z "$named" ] && "has_$part" "" -cloud-amd64; } || echo "$part"
    done
}

parts=$(missing)
[ -n "$parts" ] || exit 0
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

busybox_packages() {
    echo busybox-static
}

# The agent, and every package of a library that it may need.
agent_packages() {
    apt-cache depends --recurse --no-pre-depends --no-recommends --no-suggests --no-conflicts --no-breaks \
        --no-replaces --no-enhances qemu-guest-agent 2>/dev/null |
        grep -x 'qemu-guest-agent\|z\?lib[^ :]*'
}

download() {
    packages=$(for part in $parts; do "${part}_packages" || exit 1; done) || return 1
    # shellcheck disable=SC2086  # one word a package
    (cd "$new" && apt-get download -qq -o APT::Sandbox::User="$(id -un)" $packages)
}

echo "fetch-guest: fetching for the guests of the tests:" $parts
mkdir -p "$(dirname "$folder")"
new=$(mktemp -d "$folder.XXXXXX")
trap 'rm -rf "$new"' EXIT
[ -n "$named" ] || echo '*' >"$(dirname "$folder")/.gitignore"
download 2>/dev/null || { apt-get update -qq && download; } || {
    echo "fetch-guest: that failed; the tests that need them will say so" >&2
    exit 0
}
# The folder is whole or not there: what is interrupted here is fetched again.
[ ! -e "$folder" ] || mv "$folder" "$new/root"
mkdir -p "$new/root"
for package in "$new"/*.deb; do
    dpkg-deb -x "$package" "$new/root"
done
mv "$new/root" "$folder"
