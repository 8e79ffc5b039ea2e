//! Holds the trace of one broker against the rule that nothing is claimed before it is durable.
//!
//! Owns the reading of journal frames and of messages as far as claims need it (`docs/storage-format.md`,
//! `docs/protocol.md`), by hand and apart from the product's own code. A claim is a granted vote, an answer that says up to where a
//! log matches, or an acknowledged produce request. The rule: its frame was written to the journal before, and an
//! `fdatasync` of that file began after the write and returned 0 before the claim was handed to a socket.

use std::collections::HashMap;

use crate::durability::trace::Call;

const FRAME_MAGIC: &[u8] = b"LBfr";
const SEGMENT_MAGIC: &[u8] = b"LBSEGMNT";
const SEGMENT_HEADER: usize = 64;
const FRAME_HEADER: usize = 60;

/// What the trace of a broker shows.
#[derive(Debug, Default)]
pub(crate) struct Audit {
    /// Granted votes, matched positions, and acknowledged produce requests that were checked.
    pub(crate) votes: usize,
    pub(crate) matches: usize,
    pub(crate) produced: usize,
    /// Successful syncs of the journal.
    pub(crate) syncs: usize,
    /// Claims that came before their sync, in words.
    pub(crate) bad: Vec<String>,
    /// Of each record that begins with `marker-`: when it was durable, and when it was acknowledged.
    pub(crate) durable: HashMap<String, f64>,
    pub(crate) acked: HashMap<String, f64>,
}

#[derive(Debug, Clone, Copy)]
struct Durable {
    line: usize,
    time: f64,
}

/// What the journal holds of a broker, each with the moment from which on it was durable, if ever.
#[derive(Debug, Default)]
struct Journal {
    /// (group, index, epoch)
    entries: HashMap<(u64, u64, u64), Option<Durable>>,
    /// (group, epoch)
    votes: HashMap<(u64, u64), Option<Durable>>,
    markers: HashMap<String, Option<Durable>>,
}

fn earliest<K: std::hash::Hash + Eq>(
    map: &mut HashMap<K, Option<Durable>>,
    key: K,
    durable: Option<Durable>,
) {
    let known = map.entry(key).or_default();
    *known = match (*known, durable) {
        (Some(one), Some(other)) => Some(if one.line <= other.line { one } else { other }),
        (one, other) => one.or(other),
    };
}

fn number<const N: usize>(bytes: &[u8], at: usize) -> Option<u64> {
    let bytes = bytes.get(at..at + N)?;
    Some(
        bytes
            .iter()
            .fold(0, |value, byte| value << 8 | u64::from(*byte)),
    )
}

/// Markers in some bytes: `marker-` and what follows up to `;`.
fn markers(bytes: &[u8]) -> Vec<String> {
    let text = String::from_utf8_lossy(bytes);
    let parts = text.split("marker-").skip(1);
    parts
        .filter_map(|part| Some(part.split_once(';')?.0.to_owned()))
        .collect()
}

impl Journal {
    fn read(calls: &[Call]) -> (Self, usize) {
        let mut journal = Self::default();
        let in_journal = |call: &&Call| call.file.contains("/journal/");
        let syncs: Vec<&Call> = calls
            .iter()
            .filter(in_journal)
            .filter(|call| call.name == "fdatasync" && call.result == 0)
            .collect();
        for call in calls.iter().filter(in_journal) {
            if call.name != "pwrite64" || call.result < 0 {
                continue;
            }
            let first = syncs.partition_point(|sync| sync.start <= call.end);
            let sync = syncs.iter().skip(first).find(|sync| sync.file == call.file);
            let durable = sync.map(|sync| Durable {
                line: sync.end,
                time: sync.left,
            });
            journal.add(&call.bytes, durable);
        }
        (journal, syncs.len())
    }

    fn add(&mut self, bytes: &[u8], durable: Option<Durable>) {
        let mut at = if bytes.starts_with(SEGMENT_MAGIC) {
            SEGMENT_HEADER
        } else {
            0
        };
        while let Some(frame) = bytes.get(at..).filter(|rest| rest.starts_with(FRAME_MAGIC)) {
            let (Some(group), Some(index), Some(term), Some(length)) = (
                number::<8>(frame, 8),
                number::<8>(frame, 16),
                number::<8>(frame, 24),
                number::<4>(frame, 52),
            ) else {
                return;
            };
            let end = FRAME_HEADER + usize::try_from(length).unwrap_or(usize::MAX / 2);
            let Some(payload) = frame.get(FRAME_HEADER..end) else {
                return;
            };
            match frame.get(5) {
                Some(1 | 9) => {
                    earliest(&mut self.entries, (group, index, term), durable);
                    for marker in markers(payload) {
                        earliest(&mut self.markers, marker, durable);
                    }
                }
                Some(2) => {
                    if let Some(term) = Reader(payload).number() {
                        earliest(&mut self.votes, (group, term), durable);
                    }
                }
                _ => {}
            }
            at += end;
        }
    }
}

/// Structured values: variable-length integers, one byte for flags and small tags.
struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    fn fixed<const N: usize>(&mut self) -> Option<u64> {
        let value = number::<N>(self.0, 0)?;
        self.0 = self.0.get(N..)?;
        Some(value)
    }

    fn number(&mut self) -> Option<u64> {
        match self.byte()? {
            251 => self.fixed::<2>(),
            252 => self.fixed::<4>(),
            253 => self.fixed::<8>(),
            small => Some(u64::from(small)),
        }
    }

    /// Epoch and index, when there are any.
    fn id(&mut self) -> Option<Option<(u64, u64)>> {
        match self.byte()? {
            0 => Some(None),
            _ => Some(Some((self.number()?, self.number()?))),
        }
    }

    /// The epoch of a vote.
    fn vote(&mut self) -> Option<u64> {
        let term = self.number()?;
        self.number()?;
        self.byte()?;
        Some(term)
    }

    /// The group of a route.
    fn route(&mut self) -> Option<u64> {
        let group = self.number()?;
        self.number()?;
        self.number()?;
        Some(group)
    }

    /// What an answer to an append says to match, if it does.
    fn append_answer(&mut self) -> Option<Option<(u64, u64)>> {
        match self.number()? {
            0 => self.id(),
            1 => {
                self.number()?;
                self.number()?;
                Some(None)
            }
            2 => self.vote().map(|_| None),
            _ => self.number().map(|_| None),
        }
    }
}

/// One direction of a connection.
#[derive(Debug, Default)]
struct Stream {
    bytes: Vec<u8>,
    /// Where each call's bytes begin, with the line and the time of its entry.
    calls: Vec<(usize, usize, f64)>,
    cut: bool,
}

#[derive(Debug, Clone)]
struct Message {
    kind: u8,
    channel: u8,
    correlation: u64,
    header: Vec<u8>,
    body: Vec<u8>,
    /// Line and time at which its first byte was handed over.
    line: usize,
    time: f64,
}

impl Stream {
    fn messages(&self) -> Vec<Message> {
        let mut found = Vec::new();
        // Magic and version.
        let mut at = 8;
        while let (false, Some(length)) = (self.cut, number::<4>(&self.bytes, at)) {
            let end = at + 4 + usize::try_from(length).unwrap_or(usize::MAX / 2);
            let Some(frame) = self.bytes.get(at + 4..end) else {
                break;
            };
            let call = self.calls.partition_point(|(from, ..)| *from <= at);
            let (_, line, time) = self.calls[call - 1];
            let header = usize::try_from(number::<4>(frame, 10).unwrap_or(0)).unwrap_or(0);
            found.push(Message {
                kind: frame[0],
                channel: frame[1],
                correlation: number::<8>(frame, 2).unwrap_or(0),
                header: frame.get(14..14 + header).unwrap_or_default().to_vec(),
                body: frame.get(14 + header..).unwrap_or_default().to_vec(),
                line,
                time,
            });
            at = end;
        }
        found
    }
}

/// What was received and what was sent on each socket.
fn streams(calls: &[Call]) -> HashMap<&str, [Stream; 2]> {
    let mut found: HashMap<&str, [Stream; 2]> = HashMap::new();
    for call in calls.iter().filter(|call| call.file.starts_with("socket:")) {
        let way = match call.name.as_str() {
            "recvfrom" | "recvmsg" | "read" | "readv" => 0,
            "sendto" | "sendmsg" | "write" | "writev" => 1,
            _ => continue,
        };
        let Ok(count) = usize::try_from(call.result) else {
            continue;
        };
        let stream = &mut found.entry(&call.file).or_default()[way];
        stream
            .calls
            .push((stream.bytes.len(), call.start, call.entered));
        stream.cut |= call.bytes.len() < count;
        stream.bytes.extend(call.bytes.iter().take(count));
    }
    found
}

/// Checks every claim in the trace of one broker. `fresh`: the trace begins with an empty directory, so every frame is in it;
/// else claims about frames that it does not show are left out.
pub(crate) fn audit(calls: &[Call], fresh: bool) -> Audit {
    let (journal, syncs) = Journal::read(calls);
    let mut audit = Audit {
        syncs,
        ..Audit::default()
    };
    let times = journal
        .markers
        .iter()
        .filter_map(|(marker, at)| Some((marker.clone(), (*at)?.time)));
    audit.durable = times.collect();
    for [received, sent] in streams(calls).into_values() {
        let requests: HashMap<u64, Message> = received
            .messages()
            .into_iter()
            .filter(|message| message.kind == 3)
            .map(|message| (message.correlation, message))
            .collect();
        for answer in sent
            .messages()
            .into_iter()
            .filter(|message| message.kind == 4)
        {
            let Some(request) = requests.get(&answer.correlation) else {
                continue;
            };
            match request.channel {
                1 => raft(&mut audit, &journal, fresh, request, &answer),
                _ => produce(&mut audit, &journal, request, &answer),
            }
        }
    }
    audit
}

fn judge(
    audit: &mut Audit,
    claim: &str,
    durable: Option<Option<Durable>>,
    fresh: bool,
    line: usize,
) {
    match durable {
        Some(Some(durable)) if durable.line < line => {}
        Some(Some(durable)) => {
            audit.bad.push(format!(
                "{claim} on line {line}, durable on line {} only",
                durable.line
            ));
        }
        Some(None) => audit
            .bad
            .push(format!("{claim} on line {line}, never synced")),
        None if fresh => audit
            .bad
            .push(format!("{claim} on line {line}, never written")),
        None => {}
    }
}

fn raft(audit: &mut Audit, journal: &Journal, fresh: bool, request: &Message, answer: &Message) {
    let (mut asked, mut said) = (Reader(&request.header), Reader(&answer.header));
    let line = answer.line;
    let matched = |audit: &mut Audit, group: u64, id: Option<(u64, u64)>| {
        if let Some((epoch, index)) = id {
            audit.matches += 1;
            let durable = journal.entries.get(&(group, index, epoch)).copied();
            let claim = format!("entry {index} of epoch {epoch} of group {group} matched");
            judge(audit, &claim, durable, fresh, line);
        }
    };
    match (asked.number(), said.number()) {
        (Some(0), Some(0)) => {
            if let (Some(group), Some(id)) = (asked.route(), said.append_answer()) {
                matched(audit, group, id);
            }
        }
        (Some(1), Some(1)) => {
            let pre = request.header.last() == Some(&1);
            let (Some(group), Some(_), Some(term)) = (asked.route(), asked.vote(), said.vote())
            else {
                return;
            };
            if pre || said.byte() != Some(1) {
                return;
            }
            audit.votes += 1;
            let durable = journal.votes.get(&(group, term)).copied();
            judge(
                audit,
                &format!("vote of group {group} for epoch {term}"),
                durable,
                fresh,
                line,
            );
        }
        (Some(4), Some(5)) => {
            let (Some(count), Some(_)) = (asked.number(), said.number()) else {
                return;
            };
            for _ in 0..count {
                let (Some(group), Some(_), Some(_), Some(_)) =
                    (asked.route(), asked.vote(), asked.id(), asked.id())
                else {
                    return;
                };
                match said.byte() {
                    Some(0) => {}
                    Some(1) => match said.append_answer() {
                        Some(id) => matched(audit, group, id),
                        None => return,
                    },
                    _ => return,
                }
            }
        }
        _ => {}
    }
}

fn produce(audit: &mut Audit, journal: &Journal, request: &Message, answer: &Message) {
    // Patience and whether to forward come before the request; a produce request is the first kind. Of the answer: no error.
    let mut asked = Reader(&request.header);
    let is_produce = (asked.number(), asked.byte(), asked.number());
    if !matches!(is_produce, (Some(_), Some(_), Some(0))) || !answer.header.starts_with(&[0, 0]) {
        return;
    }
    for marker in markers(&request.body) {
        audit.produced += 1;
        let durable = journal.markers.get(&marker).copied();
        judge(
            audit,
            &format!("record {marker} acknowledged"),
            durable,
            true,
            answer.line,
        );
        audit.acked.insert(marker, answer.time);
    }
}
