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
ln -s /proc/self/fd /dev/fd
ln -s fd/0 /dev/stdin
ln -s fd/1 /dev/stdout
ln -s fd/2 /dev/stderr
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
  # What others say besides would break the lines of the rows, too.
  VIPR_AGENT=/bin/proxy-agent /bin/kernel-rows "$@" 2> /tmp/stderr
  result=$?
  sed 's/^/stderr: /' /tmp/stderr
  [ $result -eq 0 ] || code=$result
  mark "end $result"
}

# The rows of a section, from the kernel's command line; its words are separated by commas.
rows_of() { sed -n "s/.* ring\\.$1=\\([^ ]*\\).*/\\1/p" /proc/cmdline | tr , ' '; }

[ -z "$(rows_of unified)" ] || section unified $(rows_of unified)
if [ -n "$(rows_of hybrid)" ]; then
  # The layout of systemd's hybrid mode: hierarchies of version 1 where this kernel has them, and version 2 beside them.
  umount /sys/fs/cgroup
  mount -t tmpfs tmpfs /sys/fs/cgroup
  for controllers in cpu,cpuacct memory pids net_cls,net_prio; do
    mkdir /sys/fs/cgroup/$controllers
    mount -t cgroup -o $controllers cgroup /sys/fs/cgroup/$controllers 2> /dev/null \
      || echo "ring: no cgroup v1 hierarchy of $controllers"
  done
  mkdir /sys/fs/cgroup/unified
  mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified
  section hybrid --hybrid $(rows_of hybrid)
fi

dmesg | sed 's/^/dmesg: /'
mark "done $code"
poweroff -f
