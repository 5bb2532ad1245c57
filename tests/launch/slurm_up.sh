#!/usr/bin/env bash
# A real SLURM cluster on this machine, for tests: every node has its own network, host name and slurmd. Needs root and
# Debian's packages, which are unpacked into a folder and not installed. Everything lives in one pid namespace, so
# `down`, or the death of the process that holds it, leaves nothing behind.
#
#   slurm_up.sh fetch PREFIX          apt-get download, dpkg -x: SLURM, sshd and pdsh
#   slurm_up.sh up DIR NODES          munged, slurmctld, NODES slurmds; returns when all nodes are idle
#   slurm_up.sh exec DIR COMMAND      runs COMMAND as on a login node
#   slurm_up.sh ssh DIR               an sshd on every node, which lets the login node in
#   slurm_up.sh down DIR
#
# SLURM_PREFIX: where `fetch` unpacked. SLURM_TEST_KILL_WAIT: seconds that a job gets to end by itself. Nodes are n1, n2,
# ... at 10.77.0.1, ...; the login node, ctl, at 10.77.0.254; `exec DIR ip link set v2 down` cuts off n2. Nodes claim two
# CPUs each, and no GPU.
set -euo pipefail
prefix="${SLURM_PREFIX:?where slurm_up.sh fetch has unpacked the packages}"
libraries="$prefix/usr/lib/x86_64-linux-gnu"
packages=(
    slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge libmunge2 libhwloc15 liblua5.1-0
    openssh-server openssh-client libwrap0 pdsh libgenders0
)

set_paths() { # DIR
    export SLURM_CONF="$1/slurm.conf" LD_LIBRARY_PATH="$libraries:$libraries/slurm-wlm"
    export PATH="$prefix/usr/bin:$PATH"
}

server() { # NAME: its path; Debian's alternatives are not set up
    local path
    for path in "$prefix/usr/sbin/$1-wlm" "$prefix/usr/sbin/$1"; do
        if [[ -x "$path" ]]; then echo "$path" && return; fi
    done
    echo "no $1 under $prefix" >&2
    return 1
}

fetch() { # PREFIX
    mkdir -p "$1/.packages" && cd "$1/.packages"
    local file download=(apt-get -q -o APT::Sandbox::User=root download "${packages[@]}")
    # A machine that was just made has no list of packages yet.
    "${download[@]}" || { apt-get -q update && "${download[@]}"; }
    for file in *.deb; do dpkg -x "$file" ..; done
    mv ../usr/bin/pdsh.bin ../usr/bin/pdsh # in the place of a script that only chooses rsh or ssh
}

configure() { # DIR NODES
    cat >"$1/slurm.conf" <<CONF
ClusterName=lab
SlurmctldHost=ctl(10.77.0.254)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$1/munge/socket,cred_expire=5
PluginDir=$libraries/slurm-wlm
StateSaveLocation=$1/state
SlurmdSpoolDir=$1/spool/%n
SlurmctldPidFile=$1/run/slurmctld.pid
SlurmdPidFile=$1/run/slurmd-%n.pid
SlurmctldLogFile=$1/log/slurmctld.log
SlurmdLogFile=$1/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=${SLURM_TEST_PREEMPT-preempt_send_user_signal}
ReturnToService=2
JobRequeue=1
MinJobAge=7200
KillWait=${SLURM_TEST_KILL_WAIT:-20}
MessageTimeout=10
SlurmdTimeout=12
SlurmctldTimeout=10
InactiveLimit=0
PartitionName=debug  Nodes=ALL Default=YES PriorityTier=1 GraceTime=60 MaxTime=INFINITE State=UP
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP
CONF
    local i
    for i in $(seq "$2"); do
        echo "NodeName=n$i NodeAddr=10.77.0.$i CPUs=2 RealMemory=2000 State=UNKNOWN"
    done >>"$1/slurm.conf"
}

on_node() { # DIR K COMMAND: inside of the cluster's namespaces
    nsenter --net="$1/run/net-n$2" --uts="$1/run/uts-n$2" "${@:3}"
}

inner() { # DIR NODES: the first process of the cluster's namespaces
    local i
    # Before whatever else the machine does: SLURM repeats orders that a busy node does not confirm in time, and a repeated
    # order to end a lost start ends the one after it, since steps of both have one number.
    renice -n -10 -p $$ >/dev/null 2>&1 || true
    mount --make-rprivate /
    hostname ctl
    ip link set lo up
    ip link add br0 type bridge
    ip addr add 10.77.0.254/24 dev br0
    ip link set br0 up
    {
        printf '%s\n' "127.0.0.1 localhost" "10.77.0.254 ctl"
        for i in $(seq "$2"); do echo "10.77.0.$i n$i"; done
    } >"$1/hosts"
    mount --bind "$1/hosts" /etc/hosts
    for i in $(seq "$2"); do
        touch "$1/run/net-n$i" "$1/run/uts-n$i"
        unshare --net="$1/run/net-n$i" --uts="$1/run/uts-n$i" bash -c "hostname n$i; ip link set lo up"
        on_node "$1" "$i" ip link add eth0 type veth peer name "v$i" netns 1 # process 1 here is this one
        ip link set "v$i" master br0 up
        on_node "$1" "$i" bash -c "ip addr add 10.77.0.$i/24 dev eth0; ip link set eth0 up"
    done
    set_paths "$1"
    # --force: the folders above may be closed to others, as pytest's are.
    "$prefix/usr/sbin/munged" --force --key-file="$1/munge/key" --socket="$1/munge/socket" --pid-file="$1/munge/munged.pid" \
        --log-file="$1/munge/log" --seed-file="$1/munge/seed"
    "$(server slurmctld)" -c -i
    for i in $(seq "$2"); do on_node "$1" "$i" "$(server slurmd)" -N "n$i" -d "$(server slurmstepd)"; done
    while :; do sleep 60 & wait $! || true; done # bash as process 1 reaps orphans, which sleep would not
}

up() { # DIR NODES
    local i
    mkdir -p "$1"/{munge,state,log,run}
    for i in $(seq "$2"); do mkdir -p "$1/spool/n$i"; done
    chmod 755 "$1" "$1/munge" "$1/run"
    chmod 700 "$1/state"
    (umask 077 && head -c 1024 /dev/urandom >"$1/munge/key")
    configure "$1" "$2"
    unshare -m -n -u -p --fork --mount-proc --kill-child=SIGKILL bash "$0" inner "$1" "$2" >"$1/log/inner.log" 2>&1 </dev/null &
    echo $! >"$1/run/outer.pid"
    disown
    for i in $(seq 300); do
        if [[ "$(enter "$1" sinfo -h -N -t idle -p debug -o %N 2>/dev/null | sort -u | wc -l)" == "$2" ]]; then return; fi
        kill -0 "$(cat "$1/run/outer.pid")" 2>/dev/null || break
        sleep 0.1
    done
    echo "the cluster did not come up; its logs:" >&2
    tail -n 20 "$1"/log/* >&2
    down "$1"
    return 1
}

enter() { # DIR COMMAND
    local first
    first="$(pgrep -P "$(cat "$1/run/outer.pid")" | head -n 1)"
    set_paths "$1"
    nsenter -t "$first" -m -n -u -p --wd="$PWD" "${@:2}"
}

start_ssh() { # DIR: inside of the cluster's namespaces
    local i
    mkdir -p "$1/ssh" /root/.ssh /run/sshd
    chmod 700 "$1/ssh"
    # sshd and pdsh look for their parts in /usr alone; like the mounts below, in this mount namespace only.
    mount -t overlay overlay -o "lowerdir=$prefix/usr:/usr" /usr
    ssh-keygen -q -t ed25519 -N "" -f "$1/ssh/id_ed25519"
    ssh-keygen -q -t ed25519 -N "" -f "$1/ssh/host"
    cp "$1/ssh/id_ed25519.pub" "$1/ssh/authorized_keys"
    printf '%s\n' "StrictHostKeyChecking no" "UserKnownHostsFile /dev/null" "LogLevel ERROR" >"$1/ssh/config"
    printf '%s\n' "HostKey $1/ssh/host" "AuthorizedKeysFile $1/ssh/authorized_keys" "StrictModes no" "UsePAM no" \
        "PermitRootLogin yes" "PidFile none" "MaxStartups 100" >"$1/ssh/sshd_config"
    mount --bind "$1/ssh" /root/.ssh # in this mount namespace alone
    if ! grep -q ^sshd: /etc/passwd; then
        { cat /etc/passwd && echo "sshd:x:105:65534::/run/sshd:/usr/sbin/nologin"; } >"$1/passwd"
        mount --bind "$1/passwd" /etc/passwd
    fi
    for i in "$1"/run/net-n*; do
        on_node "$1" "${i##*-n}" /usr/sbin/sshd -f "$1/ssh/sshd_config" -E "$1/log/sshd"
    done
}

down() { # DIR
    if [[ -f "$1/run/outer.pid" ]]; then
        kill -KILL "$(cat "$1/run/outer.pid")" 2>/dev/null || true # and with it, by --kill-child, all of the cluster
        rm "$1/run/outer.pid"
    fi
}

case "${1:-}" in
    fetch) fetch "$2" ;;
    up) up "$2" "$3" ;;
    exec) enter "$2" "${@:3}" ;;
    ssh) enter "$2" bash "$0" start_ssh "$2" ;;
    down) down "$2" ;;
    inner) inner "$2" "$3" ;;
    start_ssh) start_ssh "$2" ;;
    *) sed -n '2,/^set/s/^# \{0,1\}//p' "$0" && exit 2 ;;
esac
