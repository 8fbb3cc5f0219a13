#!/bin/busybox sh
# The first process of a kernel of the ring. It prepares what every Linux system has, runs the rows, and says how that
# ended: what it prints is read by xtask.
#
# Filesystems and modules first; programs of Debian before those of busybox.
export PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/busybox
busybox=/bin/busybox
$busybox mount -t proc proc /proc
mark() { read -r up _ < /proc/uptime; echo "ring: $up s: $*"; }
mark "init"
$busybox --install -s /busybox
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /tmp
mkdir -p /run/netns /sys/fs/bpf /sys/kernel/tracing
mount -t bpf bpf /sys/fs/bpf
mount -t tracefs tracefs /sys/kernel/tracing
mount -t cgroup2 cgroup2 /sys/fs/cgroup
/bin/ip link set lo up

while read -r module; do
  insmod "$module" || echo "ring: cannot load $module"
done < /modules
mark "modules loaded"

# Kernel messages would break the lines of the rows. All are shown at the end; an oops is shown at once all the same.
dmesg -n 1
code=0

section() {
  mark "begin $1"
  shift
  VIPR_AGENT=/bin/proxy-agent /bin/kernel-rows "$@"
  result=$?
  [ $result -eq 0 ] || code=$result
  mark "end $result"
}

# Words for kernel-rows, from the kernel's command line.
filters=$(sed -n 's/.* ring.filters=\([^ ]*\).*/\1/p' /proc/cmdline | tr , ' ')

section unified $filters

# The layout of systemd's hybrid mode: hierarchies of version 1 where this kernel has them, and version 2 beside them.
umount /sys/fs/cgroup
mount -t tmpfs tmpfs /sys/fs/cgroup
for controller in cpu,cpuacct memory pids net_cls,net_prio; do
  mkdir /sys/fs/cgroup/$controller
  mount -t cgroup -o $controller cgroup /sys/fs/cgroup/$controller || echo "ring: no cgroup v1 hierarchy of $controller"
done
mkdir /sys/fs/cgroup/unified
mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified
section hybrid --hybrid $filters

dmesg | sed 's/^/dmesg: /'
mark "done $code"
poweroff -f
