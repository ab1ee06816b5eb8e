package daemon

import (
	"context"
	"io"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"varve.dev/api/varve"
	"varve.dev/internal/version"
)

// MetricsPath is where a daemon's metrics are.
const MetricsPath = "/metrics"

// scrapeTimeout bounds what a scrape waits for the store.
const scrapeTimeout = 5 * time.Second

// Metrics serves what k knows in Prometheus's text format.
func Metrics(k *Keeper) http.Handler {
	r := prometheus.NewRegistry()
	build := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "varve_build_info", Help: "1, with the version.", ConstLabels: prometheus.Labels{"version": version.Version},
	})
	build.Set(1)
	r.MustRegister(build, checks{k}, space{k}, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return promhttp.HandlerFor(r, promhttp.HandlerOpts{})
}

// ServeMetrics serves them on a TCP address, which has to be of this host alone,
// until the listener that it returns is closed. Errors: ErrInvalidArgument,
// ErrUnavailable.
func ServeMetrics(addr string, k *Keeper) (io.Closer, error) {
	l, err := listenLoopback("metrics", addr)
	if err != nil {
		return nil, err
	}
	mux := http.NewServeMux()
	mux.Handle("GET "+MetricsPath, Metrics(k))
	s := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	go func() { _ = s.Serve(l) }() // ends with the listener
	return s, nil
}

// space collects what the store takes of its disk.
type space struct{ k *Keeper }

var (
	spaceBytes = prometheus.NewDesc("varve_space_bytes", "Bytes of the disk that the store takes, by what they are for; they add up to all.", []string{"of"}, nil)
	freeBytes  = prometheus.NewDesc("varve_space_free_bytes", "Bytes that the store's file system still has.", nil, nil)
)

// Describe implements prometheus.Collector: what there is depends on the store.
func (s space) Describe(chan<- *prometheus.Desc) {}

// Collect implements prometheus.Collector.
func (s space) Collect(out chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), scrapeTimeout)
	defer cancel()
	u, err := s.k.DiskUsage(ctx, varve.DiskUsageRequest{})
	if err != nil {
		out <- prometheus.NewInvalidMetric(spaceBytes, err)
		return
	}
	for of, bytes := range map[string]int64{
		"images": u.Images.Bytes, "cache": u.Cache.Bytes, "cache_mounts": u.CacheMounts.Bytes, "containers": u.Containers.Bytes,
		"volumes": u.Volumes.Bytes, "quarantine": u.Quarantine.Bytes, "trash": u.Trash.Bytes, "metadata": u.Metadata,
		"directories": u.Fixed, "unfinished": u.Unfinished, "in_flight": u.InFlight,
	} {
		out <- prometheus.MustNewConstMetric(spaceBytes, prometheus.GaugeValue, float64(bytes), of)
	}
	out <- prometheus.MustNewConstMetric(freeBytes, prometheus.GaugeValue, float64(u.Free))
}

// checks collects what is kept of deep checks: nothing of one that never was.
type checks struct{ k *Keeper }

// Of the last one that came to its end, and of each that did not, yet or for
// ever.
var (
	checkedAt       = checkDesc("check_finished_timestamp_seconds", "When the last deep check of the whole store came to its end.")
	checkedFindings = checkDesc("check_findings", "What it found wrong, notices left out.")
	checkedLosses   = checkDesc("check_losses", "Findings of it by which something acknowledged is gone or wrong.")
	checkedHealed   = checkDesc("check_healed", "Findings of it that were healed then.")
	checkedBytes    = checkDesc("check_bytes", "Bytes that it read.")
	checkingSince   = checkDesc("check_unfinished_start_timestamp_seconds", "When a deep check began that has not come to its end.", "by")
	checkingBytes   = checkDesc("check_unfinished_bytes", "Bytes that it has read, as far as is noted.", "by")
)

func checkDesc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("varve_"+name, help, labels, nil)
}

// Describe implements prometheus.Collector: what there is depends on the store.
func (c checks) Describe(chan<- *prometheus.Desc) {}

// Collect implements prometheus.Collector.
func (c checks) Collect(out chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), scrapeTimeout)
	defer cancel()
	info, err := call(ctx, c.k, func(ctx context.Context, e *Engine) (info varve.Info, err error) {
		err = e.tellChecks(ctx, &info)
		return info, err
	})
	if err != nil {
		out <- prometheus.NewInvalidMetric(checkedAt, err)
		return
	}
	gauge := func(d *prometheus.Desc, value float64, labels ...string) {
		out <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, value, labels...)
	}
	if last := info.Checked; last != nil {
		gauge(checkedAt, float64(last.Finished.Unix()))
		gauge(checkedFindings, float64(last.Findings))
		gauge(checkedLosses, float64(last.Losses))
		gauge(checkedHealed, float64(last.Healed))
		gauge(checkedBytes, float64(last.Bytes))
	}
	for _, cut := range info.Checking {
		by := "user"
		if cut.Background {
			by = "daemon"
		}
		gauge(checkingSince, float64(cut.Started.Unix()), by)
		gauge(checkingBytes, float64(cut.Bytes), by)
	}
}
