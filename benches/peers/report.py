"""What the runs came to: one table and one picture, the median of the runs with the least and the greatest."""

from statistics import median
from xml.sax.saxutils import escape

from nodes import NODES

# What a row or a bar tells: its words, the figure's name, a factor to the unit.
LATENCY = [("p50, ms", "latency_p50_us", 1e-3), ("p99, ms", "latency_p99_us", 1e-3), ("p99.9, ms", "latency_p99_9_us", 1e-3)]
CPU = [("CPU s per 10⁶ records", "broker_cpu_seconds_per_million_records", 1), ("CPU s per GB", "broker_cpu_seconds_per_megabyte", 1e3)]
RATE = [("MB/s", "megabytes_per_second", 1)]
OPERATIONS = [("records/s", "records_per_second", 1)]
ROWS = {
    "W1": ("W1, packed batches", RATE + LATENCY[:2] + CPU),
    "W1-single": ("W1, single records", RATE + CPU),
    "W2": ("W2, 64 clients", OPERATIONS + LATENCY + CPU[:1]),
    "W3": ("W3, one client", OPERATIONS + LATENCY[:2]),
    "W4": ("W4, leader killed", [("next ack, median ms", "time_to_next_ack_p50_ms", 1), ("longest, ms", "time_to_next_ack_max_ms", 1)]),
    "W5": (
        "W5, at rest",
        [
            ("created in s", "created_and_led_seconds", 1),
            ("CPU, % of a core", "idle_cpu_percent_of_a_core", 1),
            ("memory, MB", "brokers_resident_megabytes", 1),
        ],
    ),
    "W6": ("W6, read back", RATE + CPU),
}
PANELS = [
    ("W1", "W1, packed batches: MB/s", *RATE[0][1:]),
    ("W1-single", "W1, single records: MB/s", *RATE[0][1:]),
    ("W2", "W2, 64 clients: records/s", *OPERATIONS[0][1:]),
    ("W2", "W2, 64 clients: p99, ms (less is better)", *LATENCY[1][1:]),
    ("W3", "W3, one client: p50, ms (less is better)", *LATENCY[0][1:]),
    ("W4", "W4, leader killed: median ms to the next ack (less is better)", "time_to_next_ack_p50_ms", 1),
    ("W5", "W5, at rest: CPU, % of a core (less is better)", "idle_cpu_percent_of_a_core", 1),
    ("W6", "W6, read back: MB/s", *RATE[0][1:]),
]


def values(results, peer, workload, logs, name, factor):
    found = [one["figures"].get(name) for one in results if (one["peer"], one["workload"], one["logs"]) == (peer, workload, logs) and "figures" in one]
    return sorted(value * factor for value in found if value is not None)


def short(value):
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}".replace(",", " ")
    return f"{value:.3g}"


def cell(found):
    if not found:
        return "–"
    text = short(median(found))
    return text if len(found) == 1 else f"{text} ({short(found[0])}–{short(found[-1])})"


def sizes(results, workload):
    """The numbers of logs that were measured; of most workloads only none."""
    return sorted({one["logs"] for one in results if one["workload"] == workload}, key=lambda logs: logs or 0)


def table(peers, left_out, results, options, machine, done):
    lines = ["# Logboom and its peers", ""]
    if not done:
        lines += ["**Not all runs are done.**", ""]
    lines += [
        f"{NODES} nodes, {NODES} copies and the clients on one machine: {machine['system']}, {machine['cores']} cores. From {results[0]['at']} to {results[-1]['at']}.",
        f"{options.warmup} s of warm-up ({options.warmup_java} s for peers in Java), {options.duration} s measured, {options.runs} run{'s' if options.runs > 1 else ''}: median (least–greatest).",
        "MB are 10⁶ bytes of the records' values; CPU is that of the servers' processes.",
        "",
        "What an acknowledgement meant:",
        "",
    ]
    said = {one["peer"]: one["acknowledgement"] for one in results if one["workload"] != "W5"}
    for peer in peers:
        lines.append(f"- {peer.title} {peer.version}: {said.get(peer.name, peer.ack)}")
    lines += [f"- {text}" for text in left_out.values()]
    limits = machine_limits(results)
    lines += ["", *limits, *([""] if limits else [])]
    lines.append("| | " + " | ".join(peer.title for peer in peers) + " |")
    lines.append("|---" * (len(peers) + 1) + "|")
    lines.append("| synced on a majority before the answer | " + " | ".join("yes" if peer.synced else "no" for peer in peers) + " |")
    for workload, (title, rows) in ROWS.items():
        for logs in sizes(results, workload):
            for words, name, factor in rows:
                cells = [cell(values(results, peer.name, workload, logs, name, factor)) for peer in peers]
                head = f"{title}, {logs} logs" if logs else title
                lines.append(f"| {head}: {words} | " + " | ".join(cells) + " |")
    for words, key in (("acknowledged records", "acknowledged"), ("of them missing", "lost"), ("records found twice", "duplicated"), ("damaged or foreign", "")):
        lines.append(f"| {words} | " + " | ".join(counted(results, peer.name, key) for peer in peers) + " |")
    failed = [one for one in results if "problem" in one]
    if failed:
        lines += ["", "Runs that failed, and are in no figure:", ""]
        for one in failed:
            logs = f", {one['logs']} logs" if one["logs"] else ""
            lines.append(f"- {one['peer']}, {one['workload']}{logs}, run {one['run']}: {one['problem']}")
    return "\n".join(lines) + "\n"


def counted(results, peer, key):
    verdicts = [one["verdict"] for one in results if one["peer"] == peer and one.get("verdict")]
    keys = [key] if key else ["corrupt", "foreign"]
    return short(sum(verdict[name] for verdict in verdicts for name in keys)) if verdicts else "–"


def machine_limits(results):
    """The machine's own figures, which `logboom bench` measures beside each run of its own."""
    found = [one["machine"]["limits"] for one in results if (one.get("machine") or {}).get("limits")]
    if not found:
        return []
    names = (
        ("append 4 KiB and fdatasync, p50", "fdatasync_4kib_p50_us", "µs"),
        ("p99", "fdatasync_4kib_p99_us", "µs"),
        ("write and sync", "write_and_sync_megabytes_per_second", "MB/s"),
        ("loopback round trip, p50", "loopback_round_trip_p50_us", "µs"),
    )
    parts = [f"{words} {cell(sorted(one[name] for one in found))} {unit}" for words, name, unit in names]
    return ["The machine's own limits, before each run of Logboom: " + "; ".join(parts) + "."]


WIDTH, LABEL, BAR, LINE, GAP = 960, 230, 560, 22, 46
SYNCED, WRITTEN, OURS = "#1f6f8b", "#b9c6cc", "#d1495b"


def picture(peers, results):
    """Bars: the length is the median, the thin line goes from the least to the greatest run."""
    parts, y = [], 62
    for workload, title, name, factor in PANELS:
        for logs in sizes(results, workload):
            bars = [(peer, values(results, peer.name, workload, logs, name, factor)) for peer in peers]
            bars = [(peer, found) for peer, found in bars if found]
            if bars:
                y = panel(parts, y, title.replace("at rest", f"{logs} logs at rest"), bars) + GAP
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" font-family="sans-serif" font-size="13">\n'
        f'<rect width="{WIDTH}" height="{y}" fill="white"/>\n'
        '<text x="20" y="26" font-size="17" font-weight="bold">Logboom and its peers</text>\n'
    )
    x = 20
    for colour, words in ((OURS, "Logboom, synced before the answer"), (SYNCED, "synced before the answer"), (WRITTEN, "not synced before the answer")):
        head += f'<rect x="{x}" y="37" width="12" height="12" fill="{colour}"/><text x="{x + 18}" y="48">{words}</text>\n'
        x += 40 + 8 * len(words)
    return head + "".join(parts) + "</svg>\n"


def panel(parts, y, title, bars):
    parts.append(f'<text x="20" y="{y + 14}" font-weight="bold">{escape(title)}</text>\n')
    y += 24
    most = max(found[-1] for _, found in bars) or 1
    for peer, found in bars:
        middle, length = y + LINE / 2 - 2, BAR * median(found) / most
        colour = OURS if peer.name == "logboom" else SYNCED if peer.synced else WRITTEN
        low, high = (LABEL + BAR * value / most for value in (found[0], found[-1]))
        parts.append(
            f'<text x="{LABEL - 8}" y="{middle + 5:.1f}" text-anchor="end">{escape(peer.title)}</text>'
            f'<rect x="{LABEL}" y="{y}" width="{max(length, 1):.1f}" height="{LINE - 5}" fill="{colour}"/>'
        )
        if high > low:
            parts.append(f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{middle:.1f}" y2="{middle:.1f}" stroke="black"/>')
        parts.append(f'<text x="{max(high, LABEL + length) + 8:.1f}" y="{middle + 5:.1f}">{short(median(found))}</text>\n')
        y += LINE
    return y
