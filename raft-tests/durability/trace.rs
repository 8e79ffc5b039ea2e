//! What `strace -f -y -ttt -T` wrote, as calls in the order in which the tracer saw them.
//!
//! Owns the text form: unfinished and resumed lines, quoted bytes, names behind descriptors. A call spans the lines from
//! its entry to its return; of two calls where one caused the other, the lines are in that order.

use std::collections::HashMap;

/// A system call that returned.
#[derive(Debug, Clone)]
pub(crate) struct Call {
    pub(crate) name: String,
    /// The descriptor's name: a path, `socket:[inode]`, …
    pub(crate) file: String,
    /// All bytes it shows, of all pieces.
    pub(crate) bytes: Vec<u8>,
    /// Some of the bytes are not shown.
    pub(crate) cut: bool,
    pub(crate) result: i64,
    /// The tracer made it fail.
    pub(crate) injected: bool,
    /// Lines of its entry and of its return.
    pub(crate) start: usize,
    pub(crate) end: usize,
    /// Seconds since 1970 at its entry and at its return.
    pub(crate) entered: f64,
    pub(crate) left: f64,
}

/// The calls in a trace, by their entry. Calls that never returned, signals and exits are left out.
pub(crate) fn parse(text: &str) -> Vec<Call> {
    let mut open: HashMap<(&str, &str), (usize, f64, String)> = HashMap::new();
    let mut calls = Vec::new();
    for (at, line) in text.lines().enumerate() {
        let Some((process, rest)) = line.trim_start().split_once(' ') else {
            continue;
        };
        let Some((time, rest)) = rest.trim_start().split_once(' ') else {
            continue;
        };
        let Ok(time) = time.parse::<f64>() else {
            continue;
        };
        let rest = rest.trim_start();
        if let Some(rest) = rest.strip_prefix("<... ") {
            let Some((name, rest)) = rest.split_once(" resumed>") else {
                continue;
            };
            let Some((start, entered, before)) = open.remove(&(process, name)) else {
                continue;
            };
            // The time of a resumed line is that of its return.
            let whole = format!("{before}{rest}");
            if let Some(mut call) = call(name, &whole, start, at, entered) {
                call.left = time;
                calls.push(call);
            }
            continue;
        }
        let Some((name, rest)) = rest.split_once('(') else {
            continue;
        };
        if let Some(before) = rest.strip_suffix("<unfinished ...>") {
            open.insert((process, name), (at, time, before.trim_end().to_owned()));
        } else if let Some(call) = call(name, rest, at, at, time) {
            calls.push(call);
        }
    }
    calls.sort_by_key(|call| call.start);
    calls
}

/// `arguments) = result … <seconds>`
fn call(name: &str, text: &str, start: usize, end: usize, entered: f64) -> Option<Call> {
    let (arguments, result) = text.rsplit_once(" = ")?;
    let arguments = arguments.trim_end().strip_suffix(')')?;
    let result_text = result.split_whitespace().next()?;
    let took = result
        .rsplit_once('<')
        .and_then(|(_, text)| text.strip_suffix('>'));
    let took: f64 = took.and_then(|text| text.parse().ok()).unwrap_or(0.0);
    let (bytes, cut) = quoted(arguments)?;
    let file = arguments.split_once('<').and_then(|(_, rest)| {
        let end = rest.find('>')?;
        rest.get(..end)
    });
    Some(Call {
        name: name.to_owned(),
        file: file.unwrap_or_default().to_owned(),
        bytes,
        cut,
        result: result_text.parse().ok()?,
        injected: result.contains("(INJECTED)"),
        start,
        end,
        entered,
        left: entered + took,
    })
}

/// The bytes in quotes, one after the other; whether any of them were cut short.
fn quoted(text: &str) -> Option<(Vec<u8>, bool)> {
    let mut found = Vec::new();
    let mut cut = false;
    let mut rest = text.as_bytes().iter().copied().peekable();
    while let Some(byte) = rest.next() {
        if byte != b'"' {
            continue;
        }
        loop {
            let byte = match rest.next()? {
                b'"' => break,
                b'\\' => match rest.next()? {
                    b'n' => b'\n',
                    b't' => b'\t',
                    b'r' => b'\r',
                    b'v' => 11,
                    b'f' => 12,
                    digit @ b'0'..=b'7' => {
                        let mut value = u32::from(digit - b'0');
                        for _ in 0..2 {
                            let Some(digit @ b'0'..=b'7') = rest.peek().copied() else {
                                break;
                            };
                            value = value * 8 + u32::from(digit - b'0');
                            rest.next();
                        }
                        u8::try_from(value).ok()?
                    }
                    other => other,
                },
                plain => plain,
            };
            found.push(byte);
        }
        let mut ahead = rest.clone();
        cut |= (0..3).all(|_| ahead.next() == Some(b'.'));
    }
    Some((found, cut))
}

/// Goal: every form of a line is understood. Method: one of each, as strace 6 writes them.
#[test]
fn lines_of_a_trace_are_understood() {
    let text = concat!(
        "71 100.000001 pwrite64(5</d/journal/0.log>, \"he\\\"l\\\\lo\\0\\1\\3779\\n\", 12, 3) = 12 <0.000019>\n",
        "72 100.000002 fdatasync(5</d/journal/0.log> <unfinished ...>\n",
        "71 100.000003 writev(6<socket:[27]>, [{iov_base=\"a\", iov_len=1}, {iov_base=\"b\"..., iov_len=9}], 2) = 10 <0.1>\n",
        "72 100.5 <... fdatasync resumed>)      = 0 <0.499998>\n",
        "72 100.6 fdatasync(5</d/journal/0.log>)          = -1 EIO (Input/output error) (INJECTED) <0.2>\n",
        "72 100.7 --- SIGCHLD {si_signo=SIGCHLD} ---\n",
        "71 100.8 +++ exited with 0 +++\n",
        "73 100.9 sendto(6<socket:[27]>, \"x\", 1, 0, NULL, 0 <unfinished ...>\n",
    );
    let calls = parse(text);
    let names: Vec<&str> = calls.iter().map(|call| call.name.as_str()).collect();
    assert_eq!(names, ["pwrite64", "fdatasync", "writev", "fdatasync"]);
    assert_eq!(calls[0].bytes, b"he\"l\\lo\0\x01\xff9\n");
    assert_eq!(
        (calls[0].file.as_str(), calls[0].result),
        ("/d/journal/0.log", 12)
    );
    assert_eq!((calls[1].start, calls[1].end, calls[1].result), (1, 3, 0));
    assert!((calls[1].left - 100.5).abs() < 1e-6 && (calls[0].left - 100.00002).abs() < 1e-6);
    assert_eq!(
        (calls[2].bytes.as_slice(), calls[2].cut),
        (b"ab".as_slice(), true)
    );
    assert_eq!((calls[3].result, calls[3].injected), (-1, true));
}
