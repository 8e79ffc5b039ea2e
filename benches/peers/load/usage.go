package main

import (
	"bytes"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
)

// Linux tells CPU times in ticks of this many a second, whatever its own clock does.
const ticksPerSecond = 100

type usage struct {
	cpuSeconds        float64
	residentMegabytes float64
}

// usageOf is what processes have used so far, together.
func usageOf(pids []int) (sum usage, err error) {
	for _, pid := range pids {
		fields, err := stat(pid)
		if err != nil {
			return sum, err
		}
		user, _ := strconv.ParseFloat(fields[11], 64)
		system, _ := strconv.ParseFloat(fields[12], 64)
		sum.cpuSeconds += (user + system) / ticksPerSecond
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		if err != nil {
			return sum, err
		}
		if _, rest, found := strings.Cut(string(status), "VmRSS:"); found {
			kilobytes, _ := strconv.ParseFloat(strings.Fields(rest)[0], 64)
			sum.residentMegabytes += kilobytes * 1024 / 1e6
		}
	}
	return sum, nil
}

// stat are the fields of /proc/PID/stat behind the name, which may hold anything; the first one is the state.
func stat(pid int) ([]string, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return nil, err
	}
	fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
	if len(fields) < 13 {
		return nil, fmt.Errorf("/proc/%d/stat has %d fields", pid, len(fields))
	}
	return fields, nil
}

func isDead(pid int) bool {
	fields, err := stat(pid)
	return err != nil || fields[0] == "Z" || fields[0] == "X"
}

// A snapshot is what was counted until one moment.
type snapshot struct {
	at      time.Time
	records uint64
	servers usage
	own     usage
}

func snap(pids []int, records *atomic.Uint64) (s snapshot, err error) {
	if s.servers, err = usageOf(pids); err != nil {
		return s, fmt.Errorf("a server has ended: %w", err)
	}
	s.own, err = usageOf([]int{os.Getpid()})
	s.at, s.records = time.Now(), records.Load()
	return s, err
}

// costs are figures of the time from before to s, under the names that `logboom bench` gives them.
func (s snapshot) costs(before snapshot, recordBytes int, f figures) {
	seconds := s.at.Sub(before.at).Seconds()
	records := float64(s.records - before.records)
	cpu := s.servers.cpuSeconds - before.servers.cpuSeconds
	if records > 0 {
		f["broker_cpu_seconds_per_megabyte"] = cpu / (records * float64(recordBytes) / 1e6)
		f["broker_cpu_seconds_per_million_records"] = cpu * 1e6 / records
	}
	f["broker_cpu_cores"] = cpu / seconds
	f["brokers_resident_megabytes"] = s.servers.residentMegabytes
	f["bench_cpu_cores"] = (s.own.cpuSeconds - before.own.cpuSeconds) / seconds
}
