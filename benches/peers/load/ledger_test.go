package main

import (
	"slices"
	"testing"
)

// Goal: what is lost, doubled, damaged or foreign is counted as such. Method: a ledger of two clients and messages made for it.
func TestVerdict(t *testing.T) {
	const size = 20
	fill := newFiller(size)
	record := func(client uint32, sequence uint64) []byte {
		r := make([]byte, size)
		fill.stamp(r, client, sequence)
		return r
	}
	damaged := record(0, 1)
	damaged[size-1] ^= 1
	l := ledger{{acked, acked, unknown}, {acked, unknown}}
	var v Verdict
	for _, message := range [][]byte{
		slices.Concat(record(0, 0), record(0, 2)),
		record(0, 0),
		damaged,
		record(1, 7),
		record(9, 0),
		record(1, 1)[:size-1],
	} {
		l.see(message, size, &v)
	}
	l.finish(&v)
	want := Verdict{Acknowledged: 3, ReadBack: 6, Lost: 2, Duplicated: 1, Corrupt: 2, Foreign: 2}
	if v != want {
		t.Fatalf("%+v instead of %+v", v, want)
	}
}

// Goal: bad usage is told before anything is done. Method: one wrong flag each.
func TestWrongUsage(t *testing.T) {
	good := []string{"-workload=W2", "-nodes=a,b,c", "-pids=7,8,9"}
	if _, err := parse(good); err != nil {
		t.Fatal(err)
	}
	for _, wrong := range []string{"-workload=W9", "-nodes=a", "-pids=1,2,x", "-record-bytes=15", "-clients=-1", "-duration=0s", "surplus"} {
		if _, err := parse(append(slices.Clone(good), wrong)); err == nil {
			t.Errorf("%s is taken", wrong)
		}
	}
}
