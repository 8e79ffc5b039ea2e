//! What the documents say about the code, checked against the code.
//!
//! Owns the reading of both. Source lines are read as text, without their comments; a name in a string counts, and has to be
//! spelt apart there.

// A check that cannot read its own repository ends with a text that says why.
#![allow(clippy::panic)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use logboom::config::{BrokerConfig, TopicConfig};

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: impl AsRef<Path>) -> String {
    let path = root().join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The Rust files below `directory`, relative to the repository.
fn sources(directory: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut left = vec![root().join(directory)];
    while let Some(path) = left.pop() {
        if path.is_dir() {
            let entries = fs::read_dir(&path).unwrap_or_else(|error| panic!("{error}"));
            left.extend(entries.filter_map(Result::ok).map(|entry| entry.path()));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let relative = path.strip_prefix(root()).unwrap_or(&path);
            found.push(relative.display().to_string());
        }
    }
    found.sort();
    assert!(!found.is_empty(), "no source below {directory}");
    found
}

/// The lines of code of a file, without comments that take the whole line or the end of it.
fn code(path: &str) -> Vec<String> {
    let without = |line: &str| line.split("//").next().unwrap_or_default().to_owned();
    read(path).lines().map(without).collect()
}

/// The module of a file in `src`: its directory, or its own name.
fn module(path: &str) -> String {
    let inside = path.strip_prefix("src/").unwrap_or(path);
    let first = inside.split('/').next().unwrap_or_default();
    first.strip_suffix(".rs").unwrap_or(first).to_owned()
}

fn is_word(character: char) -> bool {
    character.is_alphanumeric() || character == '_'
}

/// The words that follow `prefix` in a line, where `prefix` begins a word.
fn words_after(line: &str, prefix: &str) -> Vec<String> {
    let mut found = Vec::new();
    for (at, _) in line.match_indices(prefix) {
        let before = line.get(..at).unwrap_or_default();
        if before.chars().next_back().is_some_and(is_word) {
            continue;
        }
        let rest = line.get(at + prefix.len()..).unwrap_or_default();
        found.push(
            rest.chars()
                .take_while(|character| is_word(*character))
                .collect(),
        );
    }
    found
}

/// The parts of `text` between backticks.
fn quoted(text: &str) -> Vec<String> {
    text.split('`')
        .skip(1)
        .step_by(2)
        .map(str::to_owned)
        .collect()
}

/// The cells of the tables in the section of `document` that begins with `heading`.
fn rows(document: &str, heading: &str) -> Vec<Vec<String>> {
    let text = read(document);
    let section = text
        .lines()
        .skip_while(|line| !line.starts_with(heading))
        .skip(1);
    let section = section.take_while(|line| !line.starts_with("## "));
    let table = section.filter(|line| line.starts_with("| "));
    let cells = |line: &str| line.split('|').map(|cell| cell.trim().to_owned()).collect();
    let found: Vec<Vec<String>> = table.map(cells).collect();
    assert!(
        !found.is_empty(),
        "{document} has no table below {heading:?}"
    );
    found
}

/// Goal: who imports whom is as `docs/architecture.md` says, and no lower layer imports an upper one. Method: the names behind
/// `crate::` in every source file, compared with the table both ways; the table goes from the bottom to the top.
#[test]
fn imports_are_as_documented() {
    let mut allowed: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let mut below: BTreeSet<String> = BTreeSet::new();
    let mut wrong = Vec::new();
    for row in rows("docs/architecture.md", "## Who imports whom") {
        let Some(name) = row.get(1).and_then(|cell| quoted(cell).into_iter().next()) else {
            continue;
        };
        let imports: BTreeSet<String> = row
            .get(2)
            .map(|cell| quoted(cell).into_iter().collect())
            .unwrap_or_default();
        for upper in imports.difference(&below) {
            wrong.push(format!(
                "the table lets `{name}` import `{upper}`, which is not below it"
            ));
        }
        below.insert(name.clone());
        allowed.insert(name, imports);
    }
    let mut found: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for path in sources("src") {
        let me = module(&path);
        if ["lib", "main"].contains(&me.as_str()) {
            continue;
        }
        let imports = found.entry(me.clone()).or_default();
        let mut in_tests = path.ends_with("tests.rs");
        for line in code(&path) {
            in_tests |= line.starts_with("mod tests {");
            // The binary sees the library under its own name.
            for prefix in ["crate::", "logboom::"] {
                for name in words_after(&line, prefix) {
                    // A module's own tests may start whole brokers.
                    let is_module = below.contains(&name) && !(in_tests && name == "testkit");
                    if is_module && name != me {
                        if !allowed
                            .get(&me)
                            .is_some_and(|allowed| allowed.contains(&name))
                        {
                            wrong.push(format!("{path} imports `{name}`: {}", line.trim()));
                        }
                        imports.insert(name);
                    }
                }
            }
        }
    }
    for (module, imports) in &found {
        let Some(allowed) = allowed.get(module) else {
            wrong.push(format!("`{module}` is not in the table"));
            continue;
        };
        for unused in allowed.difference(imports) {
            wrong.push(format!(
                "the table lets `{module}` import `{unused}`, which it does not"
            ));
        }
    }
    for missing in allowed.keys().filter(|name| !found.contains_key(*name)) {
        wrong.push(format!("the table has `{missing}`, the code has not"));
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// Goal: what another crate brings in stays where it is used. Method: the crate's name as the first part of a path, or in a
/// `use`, in every source file.
#[test]
fn foreign_crates_stay_in_their_place() {
    let places: [(&str, &[&str]); 12] = [
        ("openraft", &["src/raft/"]),
        ("openraft_rt_tokio", &["src/raft/"]),
        ("sled", &["src/storage/catalog.rs"]),
        ("bincode", &["src/types.rs"]),
        ("kafka_protocol", &["src/record.rs", "src/record/"]),
        ("clap", &["src/cli/"]),
        ("anyhow", &["src/cli/"]),
        ("toml", &["src/cli/"]),
        ("serde_json", &["src/cli/", "src/testkit/"]),
        ("tracing_subscriber", &["src/cli/"]),
        ("hdrhistogram", &["src/cli/bench/figures.rs"]),
        ("turmoil", &["src/net/mod.rs", "src/runtime/sim.rs"]),
    ];
    // What tests may use anywhere.
    let paths: [(&str, &[&str]); 5] = [
        (
            "rustix::",
            &[
                "src/storage/disk.rs",
                "src/cli/bench/",
                "src/cli/chaos/",
                "src/cli/serve.rs",
            ],
        ),
        ("tokio::net::", &["src/net/", "src/testkit/"]),
        (
            "std::fs",
            &[
                "src/storage/disk.rs",
                "src/cli/",
                "src/testkit/faultdisk.rs",
            ],
        ),
        ("std::thread", &["src/storage/drive.rs", "src/testkit/"]),
        ("std::net::Tcp", &["src/cli/", "src/testkit/"]),
    ];
    let mut wrong = Vec::new();
    for path in sources("src") {
        let is_test = path.ends_with("tests.rs") || path.contains("/tests/");
        let mut in_tests = is_test;
        for line in code(&path) {
            // Tests stand last in their file, and may prepare files and sockets themselves.
            in_tests |= line.starts_with("#[cfg(test)]") || line.starts_with("mod tests {");
            for (name, allowed) in places {
                let is_allowed = allowed.iter().any(|place| path.starts_with(place));
                let uses = !words_after(&line, &format!("{name}::")).is_empty();
                if uses && !is_allowed {
                    wrong.push(format!("{path} names {name}: {}", line.trim()));
                }
            }
            for (name, allowed) in paths {
                let is_allowed = in_tests || allowed.iter().any(|place| path.starts_with(place));
                if !is_allowed && !words_after(&line, name).is_empty() {
                    wrong.push(format!("{path} names {name}: {}", line.trim()));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// Goal: every file says what it owns. Method: its first line.
#[test]
fn every_file_has_a_header() {
    let all = ["src", "raft-tests", "examples", "benches", "faultfs"]
        .into_iter()
        .flat_map(sources);
    let missing: Vec<String> = all.filter(|path| !read(path).starts_with("//! ")).collect();
    assert!(missing.is_empty(), "without a `//!` header: {missing:#?}");
}

/// Goal: every promise is shown by a test that exists. Method: every `path.rs::name` in the guarantees, looked up; every line
/// of their tables names one, or says that there is none.
#[test]
fn every_guarantee_names_a_test() {
    let text = read("docs/guarantees.md");
    let mut wrong = Vec::new();
    let mut count = 0;
    for name in quoted(&text)
        .into_iter()
        .filter(|name| name.contains(".rs::"))
    {
        count += 1;
        let Some((path, test)) = name.split_once(".rs::") else {
            continue;
        };
        let path = format!("{path}.rs");
        if !root().join(&path).is_file() {
            wrong.push(format!("{name}: there is no {path}"));
            continue;
        }
        let lines: Vec<String> = code(&path)
            .iter()
            .map(|line| line.trim().to_owned())
            .collect();
        let declares = |line: &String| {
            let line = line.strip_prefix("async ").unwrap_or(line);
            line.strip_prefix("fn ").is_some_and(|rest| {
                rest.strip_prefix(test)
                    .is_some_and(|rest| rest.starts_with(['(', '<']))
            })
        };
        let is_test = lines.iter().position(declares).is_some_and(|at| {
            let before = lines.get(at.saturating_sub(4)..at).unwrap_or_default();
            before
                .iter()
                .any(|line| line.starts_with("#[") && line.contains("test"))
        });
        if !is_test {
            wrong.push(format!("{name}: there is no such test"));
        }
    }
    assert!(count > 0, "no test is named");
    for heading in text.lines().filter(|line| line.starts_with("## Promise")) {
        for row in rows("docs/guarantees.md", heading).into_iter().skip(2) {
            let shown = row.get(2).map_or("", String::as_str);
            if !shown.contains(".rs::") && !shown.starts_with("not shown") {
                wrong.push(format!("no test is named: {row:?}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// Goal: no configuration key is undocumented, and no default is wrong. Method: the keys and values of the default
/// configurations against the tables.
#[test]
fn every_key_is_documented_with_its_default() {
    let table = rows("docs/operations.md", "## Configuration");
    let broker = serde_json::to_value(BrokerConfig::default()).unwrap_or_default();
    let topic = serde_json::to_value(TopicConfig::default()).unwrap_or_default();
    let keys = |value: &serde_json::Value, separator: &str| -> Vec<(String, serde_json::Value)> {
        let object = value.as_object().cloned().unwrap_or_default();
        object
            .into_iter()
            .map(|(key, value)| (key.replace('_', separator), value))
            .collect()
    };
    let known: Vec<_> = keys(&broker, "_")
        .into_iter()
        .chain(keys(&topic, "."))
        .collect();
    let mut wrong = Vec::new();
    for (key, value) in &known {
        let default = match value {
            serde_json::Value::Null => "none".to_owned(),
            serde_json::Value::String(text) if text.is_empty() => "empty".to_owned(),
            serde_json::Value::Array(items) if items.is_empty() => "empty".to_owned(),
            serde_json::Value::String(text) => format!("`{text}`"),
            other => other.to_string(),
        };
        let row = table
            .iter()
            .find(|row| row.get(1) == Some(&format!("`{key}`")));
        match row.and_then(|row| row.get(2)) {
            None => wrong.push(format!("{key} is not in the tables")),
            Some(shown) if *shown != default => {
                wrong.push(format!(
                    "{key}: the default is {default}, documented is {shown}"
                ));
            }
            Some(_) => {}
        }
    }
    for row in &table {
        let named = row
            .get(1)
            .map(|cell| cell.trim_matches('`').to_owned())
            .unwrap_or_default();
        let is_key = row.get(1).is_some_and(|cell| cell.starts_with('`'));
        if is_key && !known.iter().any(|(key, _)| *key == named) {
            wrong.push(format!("{named} is documented, but no key"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// What stands before the parenthesis that closes the one before `text`.
fn arguments(text: &str) -> &str {
    let (mut depth, mut in_text) = (1_u32, false);
    for (at, character) in text.char_indices() {
        match character {
            '"' => in_text = !in_text,
            '(' if !in_text => depth += 1,
            ')' if !in_text => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return text.get(..at).unwrap_or_default();
        }
    }
    text
}

/// Goal: an operator finds every warning and error of the log explained. Method: the text of each `warn!` and `error!` in the
/// library, looked up in the operations page.
#[test]
fn every_warning_is_explained() {
    let page = read("docs/operations.md");
    let mut wrong = Vec::new();
    for path in sources("src")
        .into_iter()
        .filter(|path| !path.starts_with("src/cli/"))
    {
        let text = code(&path).join("\n");
        for level in ["tracing::warn!(", "tracing::error!("] {
            for (at, _) in text.match_indices(level) {
                let rest = text.get(at + level.len()..).unwrap_or_default();
                let call = arguments(rest);
                let said = call
                    .split('"')
                    .skip(1)
                    .step_by(2)
                    .last()
                    .unwrap_or_default();
                // A text that is nothing but the error itself is explained with that error.
                if !said.starts_with('{') && !page.contains(said) {
                    wrong.push(format!("{path}: {said:?}"));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "not in docs/operations.md: {wrong:#?}");
}

/// Goal: no link between the documents leads nowhere. Method: every relative link in the Markdown files.
#[test]
fn links_between_documents_lead_somewhere() {
    let mut files = vec!["README.md".to_owned(), "CHANGELOG.md".to_owned()];
    for directory in ["docs", "docs/adr"] {
        let entries =
            fs::read_dir(root().join(directory)).unwrap_or_else(|error| panic!("{error}"));
        let names = entries
            .filter_map(Result::ok)
            .map(|entry| entry.file_name());
        let names = names.map(|name| name.to_string_lossy().into_owned());
        let pages = names.filter(|name| Path::new(name).extension().is_some_and(|e| e == "md"));
        files.extend(pages.map(|name| format!("{directory}/{name}")));
    }
    let mut wrong = Vec::new();
    for file in files {
        let text = read(&file);
        let here = Path::new(&file)
            .parent()
            .map(Path::to_owned)
            .unwrap_or_default();
        for link in text.split("](").skip(1) {
            let target = link.split([')', '#']).next().unwrap_or_default();
            let is_local = !target.is_empty() && !target.contains("://");
            if is_local && !root().join(&here).join(target).exists() {
                wrong.push(format!("{file}: {target}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}
