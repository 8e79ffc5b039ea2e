package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"sync"
	"sync/atomic"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
)

// figures have their unit at the end of their names.
type figures map[string]float64

func (f figures) putLatencies(times *hdrhistogram.Histogram) {
	if times.TotalCount() == 0 {
		return
	}
	us := func(ns int64) float64 { return float64(ns) / 1e3 }
	f["latency_p50_us"] = us(times.ValueAtQuantile(50))
	f["latency_p99_us"] = us(times.ValueAtQuantile(99))
	f["latency_p99_9_us"] = us(times.ValueAtQuantile(99.9))
	f["latency_max_us"] = us(times.Max())
}

// rounded to four significant digits: no run is more exact.
func (f figures) rounded() figures {
	for name, value := range f {
		if value == 0 || math.IsNaN(value) || math.IsInf(value, 0) {
			continue
		}
		scale := math.Pow(10, 3-math.Floor(math.Log10(math.Abs(value))))
		if scale < 1 {
			scale = 1
		}
		f[name] = math.Round(value*scale) / scale
	}
	return f
}

func newTimes() *hdrhistogram.Histogram {
	return hdrhistogram.New(1, int64(10*time.Minute), 3)
}

// A running load: workers that each write, wait for the answer, and write again. Workers that share a writer make a pipeline.
type running struct {
	stop    context.CancelFunc
	workers sync.WaitGroup
	acked   atomic.Uint64
	gaveUp  atomic.Pointer[error]
	watch   atomic.Pointer[watch]

	ledger ledger
	times  []shard

	mutex  sync.Mutex
	errors map[string]uint64
}

// A shard is what several workers write down together: thousands of histograms would take gigabytes.
type shard struct {
	mutex      sync.Mutex
	times      *hdrhistogram.Histogram
	operations uint64
	records    uint64
	_          [64]byte
}

// A watch waits for the first acknowledgement of what was begun after a moment.
type watch struct {
	from time.Time
	seen chan time.Time
}

// A plan is what the workers do.
type plan struct {
	workers     int
	writers     []Writer // shared out among the workers
	recordBytes int
	records     int // in one write
	attempt     time.Duration
	from, until time.Time // what is measured; a write counts when it ends within
}

const (
	afterFailure = 5 * time.Millisecond
	kindsMax     = 20
)

func start(ctx context.Context, p plan, patience time.Duration) *running {
	ctx, stop := context.WithCancel(ctx)
	r := &running{stop: stop, errors: map[string]uint64{}}
	r.ledger = make(ledger, p.workers)
	r.times = make([]shard, min(p.workers, 16))
	for i := range r.times {
		r.times[i].times = newTimes()
	}
	fill := newFiller(p.recordBytes)
	for i := range p.workers {
		r.workers.Add(1)
		go func() {
			defer r.workers.Done()
			r.work(ctx, p, i, fill, patience)
		}()
	}
	return r
}

func (r *running) work(ctx context.Context, p plan, client int, fill filler, patience time.Duration) {
	writer, shard := p.writers[client%len(p.writers)], &r.times[client%len(r.times)]
	batch := newBatch(p)
	lastAck := time.Now()
	for sequence := uint64(0); ctx.Err() == nil; sequence += uint64(p.records) {
		for i, record := range batch {
			fill.stamp(record, uint32(client), sequence+uint64(i))
			r.ledger[client] = append(r.ledger[client], unknown)
		}
		// What is under way when the load ends is waited for: its outcome is wanted.
		attempt, cancel := context.WithTimeout(context.WithoutCancel(ctx), p.attempt)
		began := time.Now()
		err := writer.Write(attempt, batch)
		ended := time.Now()
		cancel()
		if err != nil {
			r.failed(err)
			if ended.Sub(lastAck) > patience {
				err = fmt.Errorf("nothing was acknowledged for %v: %w", patience, err)
				r.gaveUp.CompareAndSwap(nil, &err)
				return
			}
			batch = newBatch(p) // the client may still hold the old one
			pause(ctx, afterFailure)
			continue
		}
		lastAck = ended
		for i := range batch {
			r.ledger[client][sequence+uint64(i)] = acked
		}
		r.acked.Add(uint64(p.records))
		if w := r.watch.Load(); w != nil && began.After(w.from) && r.watch.CompareAndSwap(w, nil) {
			w.seen <- ended
		}
		if ended.After(p.from) && ended.Before(p.until) {
			shard.mutex.Lock()
			_ = shard.times.RecordValue(min(int64(ended.Sub(began)), int64(10*time.Minute)))
			shard.operations++
			shard.records += uint64(p.records)
			shard.mutex.Unlock()
		}
	}
}

func newBatch(p plan) [][]byte {
	bytes := make([]byte, p.records*p.recordBytes)
	batch := make([][]byte, p.records)
	for i := range batch {
		batch[i] = bytes[i*p.recordBytes : (i+1)*p.recordBytes : (i+1)*p.recordBytes]
	}
	return batch
}

func (r *running) failed(err error) {
	kind := err.Error()
	kind = kind[:min(len(kind), 160)]
	r.mutex.Lock()
	defer r.mutex.Unlock()
	if _, known := r.errors[kind]; !known && len(r.errors) >= kindsMax {
		kind = "others"
	}
	r.errors[kind]++
}

func (r *running) check() error {
	if err := r.gaveUp.Load(); err != nil {
		return *err
	}
	return nil
}

// pass lets time pass until a moment, as long as the load goes on.
func (r *running) pass(ctx context.Context, until time.Time) error {
	for {
		if err := r.check(); err != nil {
			return err
		}
		left := time.Until(until)
		if left <= 0 {
			return nil
		}
		if !pause(ctx, min(left, 100*time.Millisecond)) {
			return errors.New("it takes too long, and was given up")
		}
	}
}

// finish ends the load and waits for what is under way.
func (r *running) finish(ctx context.Context) error {
	r.stop()
	done := make(chan struct{})
	go func() { r.workers.Wait(); close(done) }()
	select {
	case <-done:
		return r.check()
	case <-ctx.Done():
		return errors.New("what was under way at the end of the load was never answered")
	}
}

// put the measured load.
func (r *running) put(f figures, p plan) {
	times, operations, records := newTimes(), uint64(0), uint64(0)
	for i := range r.times {
		times.Merge(r.times[i].times)
		operations += r.times[i].operations
		records += r.times[i].records
	}
	seconds := p.until.Sub(p.from).Seconds()
	f["records_per_second"] = float64(records) / seconds
	f["megabytes_per_second"] = float64(records) * float64(p.recordBytes) / 1e6 / seconds
	if operations < records {
		f["batches_per_second"] = float64(operations) / seconds
	}
	f.putLatencies(times)
}
