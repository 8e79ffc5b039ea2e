//! What the fuzzer has found interesting, replayed; and some thousands of mutations of it, so that a build without a fuzzer looks
//! further than the corpus. `fuzz/targets.rs` says what is checked.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::print_stdout,
    reason = "tests"
)]

#[path = "../fuzz/targets.rs"]
mod targets;

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use tokio::time::Instant;

use targets::{TARGETS, Target};

/// Mutations of each target that are tried, and the longest that takes.
const MUTATIONS: u64 = 20_000;
const PATIENCE: Duration = Duration::from_secs(2);
/// The longest that one input may take.
const INPUT_PATIENCE: Duration = Duration::from_secs(5);
/// Most bytes of all corpora together.
const CORPUS_BYTES_MAX: u64 = 2 << 20;

fn corpus(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fuzz/corpus")
        .join(name)
}

/// The inputs kept for a target, in the order of their names.
fn inputs(name: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let entries =
        fs::read_dir(corpus(name)).unwrap_or_else(|error| panic!("no corpus of {name}: {error}"));
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    let read = |path: PathBuf| {
        let bytes = fs::read(&path).unwrap();
        (path, bytes)
    };
    paths.into_iter().map(read).collect()
}

/// Runs one input; when it panics or takes long, says with which bytes.
fn run((name, target): Target, from: &str, input: &[u8]) -> Result<(), String> {
    let began = Instant::now();
    let result = catch_unwind(AssertUnwindSafe(|| target(input)));
    let took = began.elapsed();
    if result.is_ok() && took <= INPUT_PATIENCE {
        return Ok(());
    }
    let kept = std::env::temp_dir().join(format!("logboom-fuzz-{name}"));
    fs::write(&kept, input).unwrap();
    let kept = kept.display();
    Err(format!(
        "{name}: {from} fails after {took:?}; its input is in {kept}"
    ))
}

/// Goal: nothing that was found comes back. Method: every input of every corpus through its target; each has some, and all
/// together stay small.
#[test]
fn every_kept_input_is_taken_or_refused() {
    let mut bytes = 0;
    let mut failures = Vec::new();
    for (name, target) in TARGETS {
        let inputs = inputs(name);
        assert!(inputs.len() >= 4, "{name} has hardly any corpus");
        for (path, input) in &inputs {
            bytes += input.len() as u64;
            failures.extend(run((name, target), &path.display().to_string(), input).err());
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
    assert!(bytes <= CORPUS_BYTES_MAX, "the corpora have {bytes} bytes");
}

/// Goal: inputs near to real ones are taken or refused, nothing else. Method: random mutations of the corpora, as many as
/// `FUZZ_MUTATIONS` or for two seconds a target; `SEED` chooses them.
#[test]
fn mutated_inputs_are_taken_or_refused() {
    let number = |name: &str| {
        std::env::var(name)
            .ok()
            .and_then(|text| text.parse::<u64>().ok())
    };
    let seed = number("SEED").unwrap_or(1);
    let wanted = number("FUZZ_MUTATIONS");
    println!("replay: SEED={seed} cargo test --test corpus mutated");
    let mut failures = Vec::new();
    for (name, target) in TARGETS {
        let inputs: Vec<Vec<u8>> = inputs(name).into_iter().map(|(_, input)| input).collect();
        let mut rng = SmallRng::seed_from_u64(seed);
        let began = Instant::now();
        let mut tried = 0;
        while tried < wanted.unwrap_or(MUTATIONS)
            && (wanted.is_some() || began.elapsed() < PATIENCE)
        {
            let input = mutate(&inputs, &mut rng);
            let from = format!("mutation {tried} of SEED={seed}");
            if let Err(failure) = run((name, target), &from, &input) {
                failures.push(failure);
                break;
            }
            tried += 1;
        }
        println!(
            "{name}: {tried} mutations of {} inputs in {:?}",
            inputs.len(),
            began.elapsed()
        );
        assert!(tried > 0, "{name}: not one mutation in {PATIENCE:?}");
    }
    assert!(failures.is_empty(), "{failures:#?}");
}

/// One of `inputs`, changed in a few places.
fn mutate(inputs: &[Vec<u8>], rng: &mut SmallRng) -> Vec<u8> {
    let mut input = inputs[rng.random_range(0..inputs.len())].clone();
    for _ in 0..rng.random_range(1..=6) {
        let at = rng.random_range(0..=input.len());
        match rng.random_range(0..8) {
            0 if at < input.len() => input[at] ^= 1 << rng.random_range(0..8),
            1 if at < input.len() => input[at] = rng.random(),
            2 if at < input.len() => {
                // Ends of the ranges, where sums go over.
                let value: u64 = [0, 1, 0x7f, 0xff, u64::MAX, u64::MAX - 1, 1 << 63, 1 << 31]
                    [rng.random_range(0..8)];
                for (to, from) in input[at..].iter_mut().zip(value.to_be_bytes()) {
                    *to = from;
                }
            }
            3 => input.truncate(at),
            4 => input.insert(at, rng.random()),
            5 if at < input.len() => {
                input.remove(at);
            }
            6 => {
                let other = &inputs[rng.random_range(0..inputs.len())];
                let from = rng.random_range(0..=other.len());
                let until = rng.random_range(from..=other.len());
                input.splice(at..at, other[from..until].iter().copied());
            }
            _ => {
                let from = rng.random_range(0..=at);
                let piece: Vec<u8> = input[from..at].to_vec();
                input.splice(at..at, piece);
            }
        }
    }
    input.truncate(64 << 10);
    input
}

/// Writes what the real encoders make into the corpora. Not a test of anything: run by hand after a format has changed, with
/// `cargo test --test corpus -- --ignored`.
#[tokio::test]
#[ignore = "writes the corpora"]
async fn make_seeds() {
    for (name, seeds) in targets::seeds().await {
        fs::create_dir_all(corpus(name)).unwrap();
        for (number, seed) in seeds.iter().enumerate() {
            fs::write(corpus(name).join(format!("seed-{number:02}")), seed).unwrap();
        }
    }
}
