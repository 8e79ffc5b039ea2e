//! The kinds of faults, how often each is drawn, and how often each must have happened in a campaign.

use std::collections::BTreeMap;

/// Every kind of fault, with how often it is drawn.
pub(super) const KINDS: [(Kind, u32); 29] = [
    (Kind::Kill, 10),
    (Kind::KillAll, 2),
    (Kind::CrashAtOperation, 8),
    (Kind::PowerLoss, 8),
    (Kind::PowerLossTorn, 8),
    (Kind::PowerLossAll, 4),
    (Kind::Partition, 8),
    (Kind::OneWay, 8),
    (Kind::Isolate, 6),
    (Kind::IsolateOneWay, 4),
    (Kind::Bridge, 3),
    (Kind::HoldLink, 5),
    (Kind::HoldHost, 5),
    (Kind::Flapping, 4),
    (Kind::CutFromClients, 3),
    (Kind::Latency, 4),
    (Kind::SlowDisk, 5),
    (Kind::FailSync, 5),
    (Kind::FailWrite, 4),
    (Kind::DiskFull, 3),
    (Kind::WallClock, 4),
    (Kind::ClockJump, 4),
    (Kind::Stop, 5),
    (Kind::Repeat, 4),
    (Kind::Transfer, 4),
    (Kind::Reassign, 4),
    (Kind::OtherDirectory, 3),
    (Kind::Twin, 4),
    (Kind::TakeData, 5),
];

/// A kind of fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// SIGKILL of one process.
    Kill,
    KillAll,
    /// Power goes at the n-th operation of a disk from now.
    CrashAtOperation,
    PowerLoss,
    PowerLossTorn,
    PowerLossAll,
    Partition,
    OneWay,
    Isolate,
    IsolateOneWay,
    /// All links are cut but those of one broker.
    Bridge,
    HoldLink,
    HoldHost,
    Flapping,
    CutFromClients,
    Latency,
    SlowDisk,
    FailSync,
    FailWrite,
    DiskFull,
    WallClock,
    /// The clock of a process jumps ahead, as after a suspension.
    ClockJump,
    /// An orderly stop.
    Stop,
    /// Messages between replicas arrive twice, the second time behind later ones.
    Repeat,
    /// A leader hands its leaderships over.
    Transfer,
    /// Copies of a partition are moved, or its preferred leader is another one.
    Reassign,
    /// A broker is started on a copy of another one's directory.
    OtherDirectory,
    /// A copy of a broker's directory, some seconds old, is started on another host, under the broker's name and beside it.
    Twin,
    /// A directory is wiped, put back to an older copy, or rots.
    TakeData,
}

/// What must have been done in a campaign of so many seeds, or it proves less than it says.
pub fn coverage(figures: &BTreeMap<String, u64>, seeds: u64) -> Vec<String> {
    let done = |name: &str| figures.get(&format!("fault.{name}")).copied().unwrap_or(0);
    let kinds = KINDS
        .iter()
        .map(|(kind, _)| kind.name())
        .filter(|name| ![Kind::TakeData.name(), Kind::Twin.name()].contains(name));
    let often = kinds.map(|name| (name, seeds / 20));
    let rarely = ["wipe", "olddir", "bitrot", "twin"].map(|name| (name, seeds / 100));
    often
        .chain(rarely)
        .filter(|(name, least)| done(name) < *least)
        .map(|(name, least)| format!("{name}: {} times, at least {least} are wanted", done(name)))
        .collect()
}

impl Kind {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Kill => "kill",
            Self::KillAll => "kill_all",
            Self::CrashAtOperation => "crash_at_operation",
            Self::PowerLoss => "power_loss",
            Self::PowerLossTorn => "power_loss_torn",
            Self::PowerLossAll => "power_loss_all",
            Self::Partition => "partition",
            Self::OneWay => "one_way",
            Self::Isolate => "isolate",
            Self::IsolateOneWay => "isolate_one_way",
            Self::Bridge => "bridge",
            Self::HoldLink => "hold_link",
            Self::HoldHost => "hold_host",
            Self::Flapping => "flapping",
            Self::CutFromClients => "cut_from_clients",
            Self::Latency => "latency",
            Self::SlowDisk => "slow_disk",
            Self::FailSync => "fail_sync",
            Self::FailWrite => "fail_write",
            Self::DiskFull => "disk_full",
            Self::WallClock => "wall_clock",
            Self::ClockJump => "clock_jump",
            Self::Stop => "stop",
            Self::Repeat => "repeat",
            Self::Transfer => "transfer",
            Self::Reassign => "reassign",
            Self::OtherDirectory => "other_directory",
            Self::Twin => "twin",
            Self::TakeData => "take_data",
        }
    }
}
