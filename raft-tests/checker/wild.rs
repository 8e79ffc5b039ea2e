//! A history's file comes from outside: whatever it says, it is read or refused, and judged without a panic.

use logboom::testkit::checker::{Coverage, check};
use logboom::testkit::history::History;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::reference;

/// Files with damage.
const FILES: u64 = 800;

/// Numbers that like to break arithmetic.
const NUMBERS: &[&str] = &[
    "0",
    "1",
    "4294967295",
    "4294967296",
    "4611686018427387903",
    "4611686018427387904",
    "9223372036854775807",
    "18446744073709551614",
    "18446744073709551615",
    "-1",
    "null",
];

/// Puts another number in the place of some.
fn renumber(text: &str, rng: &mut StdRng) -> String {
    let mut out = String::with_capacity(text.len());
    let every = rng.random_range(5..3_000);
    let mut rest = text;
    while let Some(at) = rest.find(|c: char| c.is_ascii_digit()) {
        let (before, number) = rest.split_at(at);
        let length = number
            .find(|c: char| !c.is_ascii_digit())
            .unwrap_or(number.len());
        out.push_str(before);
        if rng.random_ratio(1, every) {
            out.push_str(NUMBERS[rng.random_range(0..NUMBERS.len())]);
        } else {
            out.push_str(&number[..length]);
        }
        rest = &number[length..];
    }
    out.push_str(rest);
    out
}

/// Goal: no file of a history, however wrong, makes the judge panic. Method: files of right histories with numbers replaced by such as break
/// arithmetic, lines left out and repeated, or bytes flipped.
#[test]
fn any_file_is_judged_or_refused() {
    let (mut refused, mut passed, mut wrong) = (0, 0, 0);
    for seed in 0..FILES {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut bytes = Vec::new();
        reference::clean(seed).write(&mut bytes).unwrap();
        let text = String::from_utf8(bytes).unwrap();
        let mut bytes = match rng.random_range(0..3) {
            0 | 1 => renumber(&text, &mut rng).into_bytes(),
            _ => {
                let lines = text.lines().flat_map(|line| {
                    let times = [1, 1, 1, 1, 1, 1, 1, 1, 0, 2][rng.random_range(0..10)];
                    std::iter::repeat_n(line, times)
                });
                lines.collect::<Vec<_>>().join("\n").into_bytes()
            }
        };
        if rng.random_bool(0.1) {
            let at = rng.random_range(0..bytes.len());
            bytes[at] ^= 1 << rng.random_range(0..8);
        }
        match History::read(&bytes[..]) {
            Err(error) => {
                assert!(
                    error.to_string().starts_with("line "),
                    "seed {seed}: {error}"
                );
                refused += 1;
            }
            Ok(history) => {
                let report = check(&history, &Coverage::default());
                assert!(!report.to_string().is_empty());
                if report.passed() {
                    passed += 1;
                } else {
                    wrong += 1;
                }
            }
        }
    }
    println!("{FILES} damaged files: {refused} refused, {wrong} not passed, {passed} passed");
    assert!(refused > FILES / 10 && wrong > FILES / 10);
}
