//! When operations begin: one behind the other, or at a fixed rate whatever the answers do.
//!
//! Owns the timetable of an open loop, shared by all clients, and a clock that wakes them on time. An operation's latency counts from
//! when it was to begin: an operation that begins late because the ones before it were slow has waited as well (otherwise the
//! worst times leave the fewest traces, which is called coordinated omission).

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;

/// The timetable.
#[derive(Debug)]
pub(super) struct Timetable {
    began: Instant,
    interval_ns: f64,
    taken: AtomicU64,
}

impl Timetable {
    /// Operations at `rate` a second from `began` on.
    pub(super) fn new(began: Instant, rate: f64) -> Self {
        Self {
            began,
            interval_ns: 1e9 / rate.max(f64::MIN_POSITIVE),
            taken: AtomicU64::new(0),
        }
    }

    /// When the next operation is to begin; it is the caller's.
    pub(super) fn take(&self) -> Instant {
        self.at(self.taken.fetch_add(1, Ordering::Relaxed))
    }

    fn at(&self, number: u64) -> Instant {
        let ns = super::figures::as_figure(number) * self.interval_ns;
        self.began + Duration::from_secs_f64(ns / 1e9)
    }

    /// Operations that were to begin before `end` and that nobody has taken.
    pub(super) fn left_behind(&self, end: Instant) -> u64 {
        let taken = self.taken.load(Ordering::Relaxed);
        let mut left = 0;
        while self.at(taken + left) < end {
            left += 1;
        }
        left
    }
}

/// Wakes one client on time: the runtime's own timer rounds to milliseconds, which is more than many an operation takes.
#[derive(Debug)]
pub(super) struct Alarm {
    #[cfg(target_os = "linux")]
    timer: tokio::io::unix::AsyncFd<std::os::fd::OwnedFd>,
}

#[cfg(target_os = "linux")]
impl Alarm {
    pub(super) fn new() -> std::io::Result<Self> {
        use rustix::time::{TimerfdClockId, TimerfdFlags, timerfd_create};
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer = timerfd_create(TimerfdClockId::Monotonic, flags)?;
        // Deprecated since a type may name another descriptor each time it is asked; an owned one does not. What replaces it is
        // unsafe.
        #[allow(deprecated)]
        let timer = tokio::io::unix::AsyncFd::new(timer)?;
        Ok(Self { timer })
    }

    /// Resolves at `moment`, at once when it has passed. Cancel safe.
    pub(super) async fn until(&self, moment: Instant) -> std::io::Result<()> {
        use rustix::time::{Itimerspec, TimerfdTimerFlags, Timespec, timerfd_settime};
        loop {
            let left = moment.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            let nothing = Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            };
            let once = Itimerspec {
                it_interval: nothing,
                it_value: Timespec {
                    tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                    tv_nsec: left.subsec_nanos().into(),
                },
            };
            timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once)?;
            let mut ready = self.timer.readable().await?;
            let mut count = [0; 8];
            // An old alarm may have gone off: the clock decides.
            match rustix::io::read(&self.timer, &mut count) {
                Ok(_) | Err(rustix::io::Errno::AGAIN) => ready.clear_ready(),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

#[cfg(not(target_os = "linux"))]
impl Alarm {
    pub(super) fn new() -> std::io::Result<Self> {
        Ok(Self {})
    }

    /// Resolves at `moment`, at once when it has passed. Cancel safe.
    pub(super) async fn until(&self, moment: Instant) -> std::io::Result<()> {
        tokio::time::sleep_until(moment).await;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::figures::Latencies;
    use super::*;

    const OPERATIONS: u64 = 10_000;
    const SERVICE: Duration = Duration::from_micros(100);
    const STALL: Duration = Duration::from_secs(2);

    /// One client, in time that only these numbers move: each operation takes 100 µs, but one takes two seconds.
    fn run(timetable: Option<&Timetable>, began: Instant) -> Latencies {
        let mut times = Latencies::default();
        let mut now = began;
        for number in 0..OPERATIONS {
            let from = timetable.map_or(now, Timetable::take);
            now = now.max(from);
            now += if number == OPERATIONS / 2 {
                STALL
            } else {
                SERVICE
            };
            times.record(now - from);
        }
        times
    }

    /// Goal: a stall counts for all operations that were to begin meanwhile, not for the one that met it. Method: the same service with and
    /// without a timetable of 1000 operations a second; of 10 s, 2 s are a stall, and it takes 0.2 s to make up for it.
    #[test]
    fn a_stall_is_not_omitted() {
        let began = Instant::now();
        let closed = run(None, began);
        let timetable = Timetable::new(began, 1_000.0);
        let open = run(Some(&timetable), began);
        assert_eq!((closed.count(), open.count()), (OPERATIONS, OPERATIONS));
        // One operation in ten thousand: nobody sees it.
        assert!(closed.at_us(0.999) < 200.0, "{}", closed.at_us(0.999));
        assert!(open.at_us(0.5) < 200.0, "{}", open.at_us(0.5));
        // The last hundredth of all waited for almost all of the stall.
        let late = open.at_us(0.99) / 1e6;
        assert!((1.8..2.0).contains(&late), "{late} s");
        let (most, all) = (open.at_us(0.85), open.max_us() / 1e6);
        assert!(most > 1e5, "{most} µs");
        assert!((all - 2.0).abs() < 0.01, "{all} s");
    }

    /// Goal: what was never begun is counted. Method: a timetable of which the first five operations of a second were taken.
    #[test]
    fn what_is_left_behind_is_counted() {
        let began = Instant::now();
        let timetable = Timetable::new(began, 100.0);
        for _ in 0..5 {
            timetable.take();
        }
        assert_eq!(timetable.left_behind(began + Duration::from_secs(1)), 95);
        assert_eq!(timetable.left_behind(began), 0);
    }

    /// Goal: an alarm is neither early nor a millisecond late as a rule. Method: fifty alarms of 300 µs; the median is looked at.
    #[tokio::test]
    async fn alarms_are_on_time() {
        let alarm = Alarm::new().unwrap();
        let mut late = Vec::new();
        for _ in 0..50 {
            let moment = Instant::now() + Duration::from_micros(300);
            alarm.until(moment).await.unwrap();
            late.push(Instant::now().checked_duration_since(moment).unwrap());
        }
        late.sort();
        assert!(late[25] < Duration::from_millis(5), "{:?}", late[25]);
    }
}
