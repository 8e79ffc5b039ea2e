//! `logboom demo`: three brokers, one killed while a text streams in, nothing lost, leadership given back.
//!
//! Owns the story and its verdict. The brokers are processes of their own (`children`), what is read back is judged by
//! `compare`. Line `i` of the text goes to partition `i % 2` and carries its number; memory stays bounded whatever the text's size.

mod report;
mod stream;
mod text;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use logboom::client::{Client, NewTopic};
use logboom::types::LeaderEpoch;
use tokio::sync::watch;
use tokio::time::Instant;

use self::report::{
    ISR_AFTER_KILL, LEADERS, LEADERS_AFTER_KILL, Look, REPLICAS, Report, judge, millis,
    partition_reports,
};
use self::stream::{Killed, Progress, Signals, read_back, stream_in};
use self::text::{Text, prepare_text};
use super::children::{Brokers, Ports};
use super::directory::Directory;
use super::progress::Board;
use super::{asked_to_stop, output, topics};

#[derive(Debug, Args)]
pub(super) struct DemoArgs {
    /// A file whose lines are streamed; a text of 50,000 lines is made without it
    #[arg(long, value_name = "FILE")]
    input: Option<PathBuf>,
    /// The result as one JSON object on the last line
    #[arg(long)]
    json: bool,
    /// An empty directory for the brokers' data, which is kept; a temporary one without it
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
}

const TOPIC: &str = "topic-x";
/// The broker that is killed, as an index and as its number.
const VICTIM: usize = 0;
/// Longest line that the default `max.message.bytes` takes.
const LINE_BYTES_DEFAULT: usize = 1_048_588 - 256;

/// Longest wait for what the cluster should do by itself.
const WITHIN: Duration = Duration::from_secs(30);

pub(super) async fn run(args: DemoArgs) -> anyhow::Result<ExitCode> {
    let directory = Directory::make("demo", args.data.as_deref())?;
    let (path, text) = prepare_text(args.input.as_deref(), &directory.path).await?;
    let mut brokers = Brokers::prepare(3, &directory.path, Ports::Free)?;
    let result = tokio::select! {
        biased;
        stop = asked_to_stop() => stop.and_then(|()| anyhow::bail!("interrupted")),
        result = Box::pin(story(&args, &path, text, &mut brokers)) => result,
    };
    brokers.kill().await;
    let (report, wrong) = match result {
        Ok(told) => told,
        Err(error) => {
            return Err(error.context(format!("the demo failed ({})", directory.keep())));
        }
    };
    if args.json {
        match output::json(&report) {
            Err(error) if !output::is_closed(&error) => return Err(error),
            _ => {}
        }
    }
    if wrong.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    anyhow::bail!("{} ({})", wrong.join("; "), directory.keep())
}

/// Runs the whole story; answers with the report and with what was not as it should be.
async fn story(
    args: &DemoArgs,
    path: &Path,
    text: Text,
    brokers: &mut Brokers,
) -> anyhow::Result<(Report, Vec<String>)> {
    let mut board = Board::new(args.json);
    board.event(&format!(
        "{} lines, {} bytes from {}",
        text.lines,
        text.bytes,
        path.display()
    ))?;
    brokers.start()?;
    let client = brokers.client().await?;
    board.event(&format!(
        "brokers 1, 2 and 3 are up at {}",
        brokers.addresses().join(", ")
    ))?;

    let mut topic = NewTopic::new(TOPIC, 2, 2);
    if text.longest > LINE_BYTES_DEFAULT {
        topic = topic.with_config("max.message.bytes", &(16 << 20).to_string());
    }
    client.admin().create_topic(topic).await?;
    let mut stage = Stage {
        client: client.clone(),
        brokers,
        board,
        progress: Progress::default(),
    };
    let before = stage.wait_for(as_planned).await?;
    stage.tell(
        "created topic-x, 2 partitions, replication factor 2",
        &before,
    )?;

    let (half, reached) = watch::channel(false);
    let (killed, kill_seen) = watch::channel(None);
    let (failover, failed_over) = watch::channel(None);
    let progress = stage.progress.clone();
    let streaming = async {
        let signals = Signals {
            half,
            kill_seen,
            failover,
        };
        stream_in(&client, path, text, &progress, signals).await
    };
    let acts = stage.acts(&before, reached, killed, failed_over);
    let (streamed, ((failover, after_kill), (returned, after_return))) =
        tokio::try_join!(streaming, acts)?;
    let acked = stage.progress.acked();
    stage.event(&format!(
        "{acked} of {} records are acknowledged; reading them back",
        text.lines
    ))?;

    let counts = read_back(&client, path, text.lines).await?;
    let report = Report {
        produced: streamed,
        acked,
        read_back: counts.read_back,
        lost: counts.lost,
        duplicated: counts.duplicated,
        out_of_order: counts.out_of_order,
        failover_ms: millis(failover),
        preferred_return_ms: returned.map(millis),
        partitions: partition_reports(&before, &after_kill, &after_return),
    };
    let wrong = judge(&report, &text);
    let verdict = if wrong.is_empty() {
        "as it was written"
    } else {
        "NOT as it was written"
    };
    stage.event(&format!(
        "read back {} records, {verdict}: {} lost, {} duplicated, {} out of order",
        counts.read_back, counts.lost, counts.duplicated, counts.out_of_order
    ))?;
    Ok((report, wrong))
}

/// Every partition is led by its preferred leader, and all its replicas are in sync.
fn as_planned(looks: &[Look; 2]) -> bool {
    (looks.iter().zip(LEADERS).zip(&REPLICAS)).all(|((look, leader), isr)| look.is(leader, isr))
}

/// Everything that acts on the brokers and shows it.
struct Stage<'a> {
    client: Client,
    brokers: &'a mut Brokers,
    board: Board,
    progress: Progress,
}

impl Stage<'_> {
    fn event(&mut self, text: &str) -> anyhow::Result<()> {
        self.board.event(text)
    }

    /// An event, and who leads what now; the table shows that on a terminal.
    fn tell(&mut self, text: &str, looks: &[Look; 2]) -> anyhow::Result<()> {
        let shown = looks.iter().enumerate().map(|(number, look)| {
            let (leader, isr) = (output::or_dash(look.leader), output::list(&look.isr));
            format!("partition {number}: leader {leader}, ISR {isr}")
        });
        let shown = shown.collect::<Vec<_>>().join("; ");
        self.event(&format!("{text} ({shown})"))
    }

    /// Looks at both partitions, and shows what it sees.
    async fn look(&mut self) -> anyhow::Result<Option<[Look; 2]>> {
        self.brokers.check()?;
        let names = [TOPIC.to_owned()];
        let Ok(views) = self.client.admin().describe(Some(&names)).await else {
            return Ok(None);
        };
        let Some(view) = views.first() else {
            return Ok(None);
        };
        if self.board.is_live() {
            let (sent, acked) = (self.progress.sent(), self.progress.acked());
            let table = topics::partitions_table(&view.partitions);
            self.board
                .draw(format!("\n{table}sent {sent}  acknowledged {acked}\n"))?;
        }
        Ok(match view.partitions.as_slice() {
            [first, second] => Some([Look::at(first), Look::at(second)]),
            _ => None,
        })
    }

    /// Looks until what is seen is good, or time is over: the judge will see that it is not.
    async fn wait_for(&mut self, good: impl Fn(&[Look; 2]) -> bool) -> anyhow::Result<[Look; 2]> {
        let deadline = Instant::now() + WITHIN;
        let mut last = None;
        loop {
            // The last look counts: what could not be seen now may have changed.
            last = self.look().await?.or(last);
            match &last {
                Some(looks) if good(looks) || Instant::now() >= deadline => {
                    return Ok(looks.clone());
                }
                None if Instant::now() >= deadline => {
                    anyhow::bail!("{TOPIC} cannot be described within {WITHIN:?}");
                }
                _ => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    }

    /// The kill, the failover, the return; while the text streams in.
    async fn acts(
        &mut self,
        before: &[Look; 2],
        mut half: watch::Receiver<bool>,
        killed: watch::Sender<Killed>,
        mut failed_over: watch::Receiver<Option<Instant>>,
    ) -> anyhow::Result<((Duration, [Look; 2]), (Option<Duration>, [Look; 2]))> {
        while !*half.borrow() {
            let reached = tokio::time::timeout(Duration::from_millis(200), half.changed());
            if reached.await.is_err() {
                self.look().await?;
            }
        }
        let epoch = before.first().map_or(LeaderEpoch(0), |look| look.epoch);
        let victim = self
            .brokers
            .brokers
            .get_mut(VICTIM)
            .context("there is no broker 1")?;
        victim.kill()?;
        let at = Instant::now();
        killed.send_replace(Some((at, epoch)));
        victim.wait().await;
        self.event("half way: broker 1 is killed (kill -9)")?;

        let acknowledged = failed_over.wait_for(Option::is_some);
        let acknowledged = tokio::time::timeout(WITHIN, acknowledged).await;
        let acknowledged = acknowledged.ok().and_then(Result::ok).and_then(|at| *at);
        let acknowledged = acknowledged.with_context(|| {
            format!("partition 0 has acknowledged nothing within {WITHIN:?} after the kill")
        })?;
        let failover = acknowledged.duration_since(at);
        let after_kill = self
            .wait_for(|looks| {
                (looks.iter().zip(LEADERS_AFTER_KILL).zip(ISR_AFTER_KILL))
                    .all(|((look, leader), isr)| look.is(leader, isr))
            })
            .await?;
        let text = format!("partition 0 goes on after {} ms", failover.as_millis());
        self.tell(&text, &after_kill)?;

        let victim = self
            .brokers
            .brokers
            .get_mut(VICTIM)
            .context("there is no broker 1")?;
        victim.start()?;
        let at = Instant::now();
        self.event("broker 1 is started again")?;
        let leads_again = |looks: &[Look; 2]| {
            looks
                .iter()
                .zip(LEADERS)
                .all(|(look, leader)| look.leader == Some(leader))
        };
        let mut after_return = self.wait_for(leads_again).await?;
        if !leads_again(&after_return) {
            self.tell("broker 1 does not lead partition 0 again", &after_return)?;
            return Ok(((failover, after_kill), (None, after_return)));
        }
        let returned = at.elapsed();
        after_return = self.wait_for(as_planned).await?;
        let text = format!(
            "broker 1 leads partition 0 again after {} ms",
            returned.as_millis()
        );
        self.tell(&text, &after_return)?;
        Ok(((failover, after_kill), (Some(returned), after_return)))
    }
}
