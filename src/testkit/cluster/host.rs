//! One broker on a thread of its own, as a process is: what happens to the thread happens to all of the broker.
//!
//! Owns the thread and its runtime. Everything of a broker but the store's threads (and file access in the blocking pool) runs
//! on this one thread, so
//!
//! - a **crash** is one instant: the store is abandoned with nothing else of the broker running, and then the runtime is dropped
//!   with every task and socket, none of which is polled again;
//! - a **pause** is what SIGSTOP does: the thread blocks, timers and sockets with it; the kernel goes on taking connections and
//!   bytes. Only the store's threads go on, and finish what was handed to them: as a disk does under a stopped process.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use tokio::sync::{Notify, oneshot};

use crate::broker::Broker;
use crate::config::BrokerConfig;
use crate::types::Error;

/// Commands that wait; each is waited for before the next is given.
const COMMANDS_MAX: usize = 4;
/// How long file access that is under way may hold up the end of a crashed broker.
const LEFTOVERS: Duration = Duration::from_secs(2);

#[derive(Debug)]
enum Command {
    /// Answered by the thread just before it blocks.
    Pause(oneshot::Sender<()>),
    Resume,
    Crash,
    Stop,
}

/// A running broker and its thread. When dropped, the broker crashes and the thread is waited for.
#[derive(Debug)]
pub(super) struct Host {
    broker: Broker,
    commands: SyncSender<Command>,
    wake: Arc<Notify>,
    thread: Option<JoinHandle<()>>,
    paused: bool,
}

impl Host {
    /// Starts a broker. When this is dropped before it is done, the broker ends by itself.
    pub(super) async fn start(config: BrokerConfig) -> Result<Self, Error> {
        let (commands, inbox) = sync_channel(COMMANDS_MAX);
        let wake = Arc::new(Notify::new());
        let (started, broker) = oneshot::channel();
        let inbox = Inbox {
            commands: inbox,
            wake: wake.clone(),
        };
        let thread = Builder::new()
            .name(format!("broker-{}", config.broker_id))
            .spawn(move || run(config, inbox, started))
            .map_err(|error| failed(&error))?;
        let broker = broker.await.map_err(|error| failed(&error))??;
        Ok(Self {
            broker,
            commands,
            wake,
            thread: Some(thread),
            paused: false,
        })
    }

    pub(super) fn broker(&self) -> &Broker {
        &self.broker
    }

    pub(super) fn is_paused(&self) -> bool {
        self.paused
    }

    fn command(&self, command: Command) {
        // A thread that has ended needs no command any more.
        self.commands.try_send(command).ok();
        self.wake.notify_one();
    }

    /// Returns when nothing of the broker runs any more.
    pub(super) async fn pause(&mut self) {
        if !self.paused {
            let (sender, paused) = oneshot::channel();
            self.command(Command::Pause(sender));
            self.paused = paused.await.is_ok();
        }
    }

    pub(super) fn resume(&mut self) {
        if std::mem::take(&mut self.paused) {
            self.command(Command::Resume);
        }
    }

    /// Returns when the broker is gone and its directory is free.
    pub(super) async fn crash(self) {
        self.command(Command::Crash);
        self.join().await;
    }

    /// Stops it in order; resumes it first when it is paused.
    pub(super) async fn stop(mut self) {
        self.resume();
        self.command(Command::Stop);
        self.join().await;
    }

    async fn join(mut self) {
        if let Some(thread) = self.thread.take() {
            let joined = tokio::task::spawn_blocking(move || thread.join()).await;
            if !matches!(joined, Ok(Ok(()))) {
                tracing::debug!("a broker's thread has panicked");
            }
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            self.command(Command::Crash);
            thread.join().ok(); // its panic has been printed
        }
    }
}

fn failed(error: &dyn std::error::Error) -> Error {
    Error::Failed {
        reason: format!("the broker's thread: {error}"),
    }
}

struct Inbox {
    commands: Receiver<Command>,
    wake: Arc<Notify>,
}

impl Inbox {
    /// The next command. Whoever has gone without one wants the broker gone. Cancel safe.
    async fn next(&mut self) -> Command {
        loop {
            match self.commands.try_recv() {
                Ok(command) => return command,
                Err(TryRecvError::Disconnected) => return Command::Crash,
                Err(TryRecvError::Empty) => self.wake.notified().await,
            }
        }
    }

    /// As `next`, with the thread blocked.
    fn next_blocking(&mut self) -> Command {
        self.commands.recv().unwrap_or(Command::Crash)
    }
}

fn run(config: BrokerConfig, inbox: Inbox, started: oneshot::Sender<Result<Broker, Error>>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    match runtime {
        Ok(runtime) => {
            runtime.block_on(live(config, inbox, started));
            runtime.shutdown_timeout(LEFTOVERS);
        }
        Err(error) => {
            started.send(Err(failed(&error))).ok(); // nobody waits any more
        }
    }
}

async fn live(
    config: BrokerConfig,
    mut inbox: Inbox,
    started: oneshot::Sender<Result<Broker, Error>>,
) {
    let broker = match Broker::builder(config).start().await {
        Ok(broker) => broker,
        Err(error) => {
            started.send(Err(error)).ok(); // nobody waits any more
            return;
        }
    };
    if started.send(Ok(broker.clone())).is_err() {
        return broker.abandon();
    }
    loop {
        match inbox.next().await {
            Command::Pause(paused) => {
                paused.send(()).ok(); // nobody waits any more
                if matches!(inbox.next_blocking(), Command::Crash) {
                    return broker.abandon();
                }
            }
            Command::Resume => {}
            Command::Crash => return broker.abandon(),
            Command::Stop => {
                let crashed = async { while !matches!(inbox.next().await, Command::Crash) {} };
                tokio::select! {
                    biased;
                    () = crashed => broker.abandon(),
                    () = broker.shutdown() => {}
                }
                return;
            }
        }
    }
}
