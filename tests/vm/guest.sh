#!/bin/sh
# Process 1 of the guest: the mounts that every host has, one set-up, one program, and the end.
# The second serial port is the report: JSON lines, and nothing else.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8 LAB_PATIENCE=4
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /tmp
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t bpf bpf /sys/fs/bpf
hostname vm
ip link set lo up

# What a box of vagrant/ runs, but for the set-up, which the image is, and for doctor, which is a step of tests.vm.guest.
/checkout/vagrant/provision.sh --no-setup --no-doctor -- .venv/bin/python -m tests.vm.guest /dev/ttyS1
sync
exec busybox reboot -f # qemu ends here: -no-reboot
