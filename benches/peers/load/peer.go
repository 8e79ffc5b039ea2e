package main

import (
	"context"
	"fmt"
	"time"
)

// A Peer is a replicated log of somebody else's, with three nodes. Nodes are numbered from 0 in the order of -nodes.
type Peer interface {
	// Create makes a log with three replicas that takes records when this returns.
	Create(ctx context.Context, name string) error
	// CreateMany makes count logs, or one with so many partitions where that is what the peer has.
	CreateMany(ctx context.Context, name string, count int) error
	// Leader is the number of the node that leads the log.
	Leader(ctx context.Context, name string) (int, error)
	// Whole says whether all three replicas are up and in step.
	Whole(ctx context.Context, name string) (bool, error)
	// Open gives a writer with a connection of its own.
	Open(ctx context.Context, name string, how How) (Writer, error)
	// Read gives every stored message of the log to each, once, in the peer's order. A message holds one or more whole records and is
	// not valid after each has returned.
	Read(ctx context.Context, name string, each func(message []byte)) error
	// ReadsOnce says that what was read is gone.
	ReadsOnce() bool
	Close()
}

// How a writer is used.
type How struct {
	// First is the node to connect to. Others are used when it is gone, if Roams is set.
	First int
	Roams bool
	// Packed says that writes are batches, InFlight how many of them, or of single records, are unanswered at most.
	Packed    bool
	Pipelined bool
	InFlight  int
	// RecordBytes is the size of a record, BatchBytes that of the records of a batch, made by who writes or by the client library.
	RecordBytes int
	BatchBytes  int
}

// A Writer is safe for many goroutines.
type Writer interface {
	// Write returns nil when all records were acknowledged. The records may be used again after that, and never after an error.
	Write(ctx context.Context, records [][]byte) error
	Close()
}

// open makes the client of a peer. ask puts a question to the program that started this one.
func open(ctx context.Context, o *options, ask func(string) (string, error)) (Peer, error) {
	switch o.peer {
	case "nats":
		return openNats(o.nodes)
	case "etcd":
		return openEtcd(o.nodes)
	case "rabbitmq":
		return openRabbit(o.nodes, ask)
	case "kafka":
		return openKafka(o.nodes)
	}
	return nil, fmt.Errorf("-peer %q: use nats, etcd, rabbitmq or kafka", o.peer)
}

// retry calls f until it works or ctx ends, and then tells the last error.
func retry(ctx context.Context, what string, f func(ctx context.Context) error) error {
	for {
		attempt, cancel := context.WithTimeout(ctx, 5*time.Second)
		err := f(attempt)
		cancel()
		if err == nil {
			return nil
		}
		if !pause(ctx, 100*time.Millisecond) {
			return fmt.Errorf("%s: %w", what, err)
		}
	}
}

// pause sleeps, and says whether ctx still goes on.
func pause(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}

// inParallel calls f for 0 to count-1, eight at a time, and gives the first error.
func inParallel(count int, f func(i int) error) error {
	next, failed := make(chan int), make(chan error, 8)
	for range 8 {
		go func() {
			var first error
			for i := range next {
				if first == nil {
					first = f(i)
				}
			}
			failed <- first
		}()
	}
	for i := range count {
		next <- i
	}
	close(next)
	var first error
	for range 8 {
		if err := <-failed; err != nil && first == nil {
			first = err
		}
	}
	return first
}

// joined puts the records of a batch into one message, for peers whose unit is the message.
func joined(records [][]byte) []byte {
	if len(records) == 1 {
		return records[0]
	}
	message := make([]byte, 0, len(records)*len(records[0]))
	for _, record := range records {
		message = append(message, record...)
	}
	return message
}
