package main

import (
	"encoding/binary"
	"hash/crc32"
	"math/rand/v2"
)

// stampBytes is the least size of a record: who wrote it, the how manieth of that client it is, and a checksum of the rest.
const stampBytes = 16

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// A filler is random bytes, so that nothing gets smaller by compression.
type filler []byte

func newFiller(recordBytes int) filler {
	f := make(filler, recordBytes+1<<20)
	source := rand.NewChaCha8([32]byte{1})
	_, _ = source.Read(f)
	return f
}

// stamp makes record the sequence-th of a client.
func (f filler) stamp(record []byte, client uint32, sequence uint64) {
	at := (sequence*7919 + uint64(client)*104729) % (1 << 20)
	copy(record, f[at:])
	binary.LittleEndian.PutUint32(record[0:], client)
	binary.LittleEndian.PutUint64(record[4:], sequence)
	binary.LittleEndian.PutUint32(record[12:], checksum(record))
}

func checksum(record []byte) uint32 {
	return crc32.Update(crc32.Checksum(record[:12], castagnoli), castagnoli, record[stampBytes:])
}

// What a client knows of a record, and how often it was read back above that.
const (
	unknown byte = iota
	acked
	seenOnce  = 2
	seenLimit = 255 - seenOnce
)

// A ledger has one byte for each record that a client wrote, in the order of their sequence numbers.
type ledger [][]byte

// Verdict says what was read back.
type Verdict struct {
	Acknowledged uint64 `json:"acknowledged"`
	ReadBack     uint64 `json:"read_back"`
	Lost         uint64 `json:"lost"`
	Duplicated   uint64 `json:"duplicated"`
	Corrupt      uint64 `json:"corrupt"`
	Foreign      uint64 `json:"foreign"`
}

// see counts the records of one message.
func (l ledger) see(message []byte, recordBytes int, v *Verdict) {
	for ; len(message) >= recordBytes; message = message[recordBytes:] {
		record := message[:recordBytes]
		v.ReadBack++
		if binary.LittleEndian.Uint32(record[12:]) != checksum(record) {
			v.Corrupt++
			continue
		}
		client, sequence := binary.LittleEndian.Uint32(record), binary.LittleEndian.Uint64(record[4:])
		if uint64(client) >= uint64(len(l)) || sequence >= uint64(len(l[client])) {
			v.Foreign++
			continue
		}
		entry := &l[client][sequence]
		if *entry >= seenOnce {
			v.Duplicated++
		}
		if *entry < seenLimit {
			*entry += seenOnce
		}
	}
	if len(message) > 0 {
		v.Corrupt++
	}
}

// finish counts what was acknowledged and never seen.
func (l ledger) finish(v *Verdict) {
	for _, entries := range l {
		for _, entry := range entries {
			if entry&acked != 0 {
				v.Acknowledged++
				if entry < seenOnce {
					v.Lost++
				}
			}
		}
	}
}
