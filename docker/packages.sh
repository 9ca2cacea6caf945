#!/bin/bash
# Install Debian packages. DEBIAN=snapshot: as they were on the day the base image was made, so that the same file gives
# the same image next year; Debian's own images name that snapshot in a comment. DEBIAN=current: as they are now.
set -euo pipefail
export DEBIAN_FRONTEND=noninteractive

if [ "$DEBIAN" = snapshot ]; then
    file=/etc/apt/sources.list.d/debian.sources
    if ! grep -qs '^# http.*/[0-9T]*Z$' "$file"; then
        echo "error: the base image names no snapshot of Debian in $file" >&2
        echo "next: take a Debian image as BASE_IMAGE, or --build-arg DEBIAN=current" >&2
        exit 2
    fi
    # A snapshot's lists have expired; they are signed all the same.
    sed -i '/^URIs:/d; s|^# \(http.*/[0-9T]*Z\)$|URIs: \1\nCheck-Valid-Until: no|' "$file"
fi
apt-get update -q
apt-get install -q -y --no-install-recommends "$@"
rm -rf /var/lib/apt/lists/* /var/cache/apt/archives/*.deb /var/log/apt /var/log/dpkg.log
