package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"
)

const logName = "bench"

// A bench is one run.
type bench struct {
	*options
	peer   Peer
	ask    func(string) (string, error)
	result Result
}

// within gives a part of the run its own limit.
func (b *bench) within(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(ctx, b.patience)
}

// plan opens the connections: one for each client, to the leader's node unless that is to be killed.
func (b *bench) plan(ctx context.Context) (p plan, err error) {
	leader, err := b.peer.Leader(ctx, logName)
	if err != nil {
		return p, err
	}
	p = plan{workers: b.clients, recordBytes: b.recordBytes, records: 1, attempt: 30 * time.Second}
	how := How{First: leader, RecordBytes: b.recordBytes, BatchBytes: b.batchBytes, InFlight: 1}
	inBatch := b.batchBytes / b.recordBytes
	switch b.workload {
	case "W1", "W6":
		p.records, p.workers = inBatch, b.clients*b.inFlight
		how.Packed, how.Pipelined, how.InFlight = true, true, b.inFlight
	case "W1-single":
		p.workers = b.clients * b.inFlight * inBatch
		how.Pipelined, how.InFlight = true, b.inFlight*inBatch
	case "W4":
		p.attempt, how.Roams = b.attempt, true
	}
	for i := range b.clients {
		if how.Roams {
			how.First = i % len(b.nodes)
		}
		writer, err := b.peer.Open(ctx, logName, how)
		if err != nil {
			return p, err
		}
		p.writers = append(p.writers, writer)
	}
	return p, nil
}

// load writes, measures, and reads everything back.
func (b *bench) load(ctx context.Context) error {
	preparing, cancel := b.within(ctx)
	defer cancel()
	if err := b.peer.Create(preparing, logName); err != nil {
		return err
	}
	if err := b.whole(preparing); err != nil {
		return err
	}
	p, err := b.plan(preparing)
	if err != nil {
		return err
	}
	p.from = time.Now().Add(b.warmup)
	p.until = p.from.Add(b.duration)
	if b.workload == "W4" {
		p.until = p.from.Add(24 * time.Hour)
	}
	r := start(ctx, p, b.patience)
	err = b.measure(ctx, r, &p)
	ending, cancel := b.within(ctx)
	defer cancel()
	err = errors.Join(err, r.finish(ending))
	b.result.Errors = r.errors
	if err != nil {
		return err
	}
	for _, writer := range p.writers {
		writer.Close()
	}
	if b.workload != "W6" {
		r.put(b.result.Figures, p)
	}
	return b.readBack(ctx, r.ledger)
}

func (b *bench) measure(ctx context.Context, r *running, p *plan) error {
	if err := r.pass(ctx, p.from); err != nil {
		return err
	}
	if b.workload == "W4" {
		err := b.kill(ctx, r)
		p.until = time.Now()
		return err
	}
	before, err := snap(b.pids, &r.acked)
	if err != nil {
		return err
	}
	if err := r.pass(ctx, p.until); err != nil {
		return err
	}
	after, err := snap(b.pids, &r.acked)
	if err == nil && after.records == before.records {
		err = errors.New("nothing was acknowledged while it was measured")
	}
	if err == nil && b.workload != "W6" {
		after.costs(before, b.recordBytes, b.result.Figures)
	}
	return err
}

// readBack looks for every record; in W6 that, or a second time, is measured.
func (b *bench) readBack(ctx context.Context, l ledger) error {
	var verdict Verdict
	var read atomic.Uint64
	check := func(message []byte) { l.see(message, b.recordBytes, &verdict) }
	count := func(message []byte) { read.Add(uint64(len(message) / b.recordBytes)) }
	both := func(message []byte) { check(message); count(message) }
	timed := b.workload == "W6"
	if !timed || !b.peer.ReadsOnce() {
		if err := b.read(ctx, check); err != nil {
			return err
		}
		both = count
	}
	if timed {
		before, err := snap(b.pids, &read)
		if err != nil {
			return err
		}
		if err := b.read(ctx, both); err != nil {
			return err
		}
		after, err := snap(b.pids, &read)
		if err != nil {
			return err
		}
		f, records, seconds := b.result.Figures, float64(read.Load()), after.at.Sub(before.at).Seconds()
		f["records"], f["seconds"] = records, seconds
		f["records_per_second"] = records / seconds
		f["megabytes_per_second"] = records * float64(b.recordBytes) / 1e6 / seconds
		after.costs(before, b.recordBytes, f)
	}
	l.finish(&verdict)
	b.result.Verdict = &verdict
	if verdict.ReadBack == 0 {
		return errors.New("nothing could be read back")
	}
	return nil
}

func (b *bench) read(ctx context.Context, each func([]byte)) error {
	ctx, cancel := b.within(ctx)
	defer cancel()
	return b.peer.Read(ctx, logName, each)
}

// whole waits until all three replicas are in step.
func (b *bench) whole(ctx context.Context) error {
	ctx, cancel := b.within(ctx)
	defer cancel()
	for {
		attempt, done := context.WithTimeout(ctx, 5*time.Second)
		good, err := b.peer.Whole(attempt, logName)
		done()
		if good {
			return nil
		}
		if !pause(ctx, 100*time.Millisecond) {
			return errors.Join(fmt.Errorf("the replicas are not in step after %v", b.patience), err)
		}
	}
}

// kill ends the process of the leader's node, again and again, and measures how long nothing is acknowledged.
func (b *bench) kill(ctx context.Context, r *running) error {
	times, again := newTimes(), newTimes()
	for range b.kills {
		if err := errors.Join(r.check(), b.whole(ctx)); err != nil {
			return err
		}
		pause(ctx, b.killPause)
		asking, cancel := b.within(ctx)
		leader := 0
		err := retry(asking, "who leads", func(ctx context.Context) (err error) {
			leader, err = b.peer.Leader(ctx, logName)
			return err
		})
		cancel()
		if err != nil {
			return err
		}
		if err := b.killOnce(ctx, r, leader, times.RecordValue); err != nil {
			return err
		}
		answer, err := b.ask("restart " + strconv.Itoa(leader))
		if err != nil {
			return err
		}
		if b.pids[leader], err = strconv.Atoi(answer); err != nil {
			return fmt.Errorf("the answer to a restart was %q", answer)
		}
		restarted := time.Now()
		if err := b.whole(ctx); err != nil {
			return err
		}
		_ = again.RecordValue(int64(time.Since(restarted)))
	}
	f, ms := b.result.Figures, func(ns int64) float64 { return float64(ns) / 1e6 }
	f["kills"] = float64(b.kills)
	f["time_to_next_ack_p50_ms"] = ms(times.ValueAtQuantile(50))
	f["time_to_next_ack_p99_ms"] = ms(times.ValueAtQuantile(99))
	f["time_to_next_ack_max_ms"] = ms(times.Max())
	f["in_sync_again_p50_ms"] = ms(again.ValueAtQuantile(50))
	return nil
}

// killOnce measures from the signal to the first acknowledgement of a write that was begun when the process was dead.
func (b *bench) killOnce(ctx context.Context, r *running, node int, record func(int64) error) error {
	killed := time.Now()
	if err := syscall.Kill(b.pids[node], syscall.SIGKILL); err != nil {
		return fmt.Errorf("kill the leader's process %d: %w", b.pids[node], err)
	}
	for !isDead(b.pids[node]) {
		if time.Since(killed) > 10*time.Second {
			return fmt.Errorf("process %d does not die", b.pids[node])
		}
		time.Sleep(200 * time.Microsecond)
	}
	w := &watch{from: time.Now(), seen: make(chan time.Time, 1)}
	r.watch.Store(w)
	patience := time.NewTimer(b.patience)
	defer patience.Stop()
	select {
	case at := <-w.seen:
		return record(int64(at.Sub(killed)))
	case <-patience.C:
		return fmt.Errorf("nothing was acknowledged within %v after the leader's node %d was killed", b.patience, node)
	case <-ctx.Done():
		return errors.New("it takes too long, and was given up")
	}
}

// idle measures what logs cost while nothing happens.
func (b *bench) idle(ctx context.Context) error {
	empty, emptyMB, err := b.rest(ctx)
	if err != nil {
		return err
	}
	began := time.Now()
	creating, cancel := context.WithTimeout(ctx, b.patience+time.Duration(b.logs)*time.Second)
	defer cancel()
	if err := b.peer.CreateMany(creating, logName, b.logs); err != nil {
		return err
	}
	f := b.result.Figures
	f["created_and_led_seconds"] = time.Since(began).Seconds()
	full, fullMB, err := b.rest(ctx)
	if err != nil {
		return err
	}
	f["idle_cpu_percent_of_a_core"], f["idle_cpu_percent_of_a_core_without"] = full, empty
	f["brokers_resident_megabytes"], f["brokers_resident_megabytes_without"] = fullMB, emptyMB
	f["resident_kilobytes_per_partition"] = (fullMB - emptyMB) * 1e3 / float64(b.logs)
	f["created_per_second"] = float64(b.logs) / math.Max(f["created_and_led_seconds"], 1e-3)
	return nil
}

// rest is the CPU, in percent of a core, and the memory of all nodes together while nothing is asked of them.
func (b *bench) rest(ctx context.Context) (percent, megabytes float64, err error) {
	pause(ctx, b.warmup)
	before, err := usageOf(b.pids)
	if err != nil {
		return 0, 0, err
	}
	began := time.Now()
	if !pause(ctx, b.duration) {
		return 0, 0, errors.New("it takes too long, and was given up")
	}
	after, err := usageOf(b.pids)
	seconds := time.Since(began).Seconds()
	return 100 * (after.cpuSeconds - before.cpuSeconds) / seconds, after.residentMegabytes, err
}
