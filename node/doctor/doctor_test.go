package doctor

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"

	"github.com/ctrlplane/pilot/copilot/client"
	"github.com/ctrlplane/pilot/copilot/server"
	"github.com/ctrlplane/pilot/copilot/server/servertest"
	"github.com/ctrlplane/pilot/keyprovider"
	"github.com/ctrlplane/pilot/plugin"
)

func examine(t *testing.T, d *Doctor) map[string]Step {
	t.Helper()
	steps := map[string]Step{}
	for s := range d.Examine(t.Context()) {
		if s.Result == Failed && len(s.Fix) == 0 || s.Detail == "" {
			t.Errorf("%s has no detail or no fix: %+v", s.Name, s)
		}
		steps[s.Name] = s
	}
	if len(steps) != 9 {
		t.Errorf("%d steps", len(steps))
	}
	return steps
}

func results(steps map[string]Step, result Result) (names []string) {
	for name, s := range steps {
		if s.Result == result {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

func TestUnusableConfigurationSkipsTheOtherSteps(t *testing.T) {
	steps := examine(t, &Doctor{Configuration: "pilot.toml", ConfigurationError: errors.New("line 1: no")})
	if s := steps[StepConfiguration]; s.Result != Failed || !strings.Contains(s.Detail, "line 1: no") || s.Fix[0] != "correct pilot.toml" {
		t.Errorf("%+v", s)
	}
	if n := len(results(steps, Skipped)); n != 8 {
		t.Errorf("%d steps are skipped: %v", n, steps)
	}
}

// TestDoctorSuggestsInstallingWhereThereIsNoPilot examines a machine without pilot.
func TestDoctorSuggestsInstallingWhereThereIsNoPilot(t *testing.T) {
	dir := t.TempDir()
	d := &Doctor{Configuration: filepath.Join(dir, "pilot.toml"), Listen: "unix://" + filepath.Join(dir, "k"), DiffSocket: filepath.Join(dir, "d"), Containerd: filepath.Join(dir, "c"), ProviderNames: []string{"pilot"}}
	steps := examine(t, d)
	for _, name := range []string{StepKeyProvider, StepDiffer} {
		if s := steps[name]; s.Result != Failed || !slices.Equal(s.Fix, []string{installPilot}) {
			t.Errorf("%+v", s)
		}
	}
}

// serve serves on a socket until the test ends.
func serve(t *testing.T, s *grpc.Server) (socket string) {
	t.Helper()
	socket = filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	go s.Serve(l)
	t.Cleanup(s.Stop)
	return socket
}

// TestDoctorTellsPilotFromOtherServers examines the sockets of a pilot without a broker and a containerd.
func TestDoctorTellsPilotFromOtherServers(t *testing.T) {
	nobody := filepath.Join(t.TempDir(), "nobody.sock")
	broker, err := client.New(client.Config{URLs: []string{"unix://" + nobody}})
	if err != nil {
		t.Fatal(err)
	}
	containerd, err := plugin.Dial(nobody)
	if err != nil {
		t.Fatal(err)
	}
	defer containerd.Close()
	keys := grpc.NewServer()
	service := keyprovider.Service{Provider: keyprovider.New(broker, keyprovider.Config{})}
	service.Register(keys)
	diffs := plugin.NewServer(containerd, plugin.Config{})

	d := &Doctor{Configuration: os.DevNull, Listen: "unix://" + serve(t, keys), DiffSocket: serve(t, diffs), Containerd: nobody, ProviderNames: []string{"pilot"}}
	steps := examine(t, d)
	if ok := results(steps, OK); !slices.Equal(ok, []string{StepConfiguration, StepDiffer, StepKeyProvider}) {
		t.Errorf("ok: %v in %v", ok, steps)
	}
	if failed := results(steps, Failed); !slices.Equal(failed, []string{StepContainerd}) {
		t.Errorf("failed: %v", failed)
	}

	// Something else that speaks gRPC.
	other := serve(t, grpc.NewServer())
	d.Listen, d.DiffSocket = "unix://"+other, other
	steps = examine(t, d)
	for _, name := range []string{StepKeyProvider, StepDiffer} {
		if s := steps[name]; s.Result != Failed || !strings.Contains(s.Detail, "is not pilot's") {
			t.Errorf("%+v", s)
		}
	}
}

// TestDoctorAcceptsNodeThatMayOnlyUnwrap examines nodes whose policy gives them no KEK, and no
// right to wrap.
func TestDoctorAcceptsNodeThatMayOnlyUnwrap(t *testing.T) {
	dir := t.TempDir()
	policy := filepath.Join(dir, "policy.toml")
	rules := fmt.Sprintf(`
[[rule]]
identities = [%q]
keks = ["unwraps", "absent"]
actions = ["unwrap"]

[[rule]]
identities = [%[1]q]
keks = ["wraps"]
actions = ["wrap"]

[[rule]]
identities = [%[1]q]
keks = ["both"]
actions = ["wrap", "unwrap"]
`, fmt.Sprint("uid:", os.Getuid()))
	if err := os.WriteFile(policy, []byte(rules), 0o600); err != nil {
		t.Fatal(err)
	}
	servertest.CreateKEKs(t, dir, "unwraps", "wraps", "both", "other")
	url := servertest.Serve(t, server.Config{Dir: dir, Policy: policy})
	broker, err := client.New(client.Config{URLs: []string{url}})
	if err != nil {
		t.Fatal(err)
	}
	newProvider := func() *keyprovider.Provider { return keyprovider.New(broker, keyprovider.Config{}) }
	keys := grpc.NewServer()
	service := keyprovider.Service{Provider: newProvider()}
	service.Register(keys)
	listen := "unix://" + serve(t, keys)

	for _, test := range []struct {
		keks        []string
		result      Result
		detail, fix string
	}{
		{[]string{"unwraps"}, Skipped, `may unwrap but not wrap with KEK "unwraps"`, ""},
		{[]string{"unwraps", "both"}, OK, `wraps and unwraps with KEK "both"; may unwrap but not wrap with KEK "unwraps"`, ""},
		{[]string{"wraps"}, Failed, "not allowed", "copilot policy check uid:0 wraps unwrap"},
		{[]string{"other"}, Failed, "not allowed", "copilot policy check uid:0 other unwrap"},
		{[]string{"absent"}, Failed, "there is no such KEK", "copilot keys create absent"},
	} {
		d := &Doctor{
			Configuration: os.DevNull, Listen: listen, Containerd: filepath.Join(dir, "nobody"), ProviderNames: []string{"pilot"},
			Brokers: broker, Provider: newProvider(), BrokerURLs: []string{url}, KEKs: test.keks,
		}
		s := examine(t, d)[StepBroker]
		if s.Result != test.result || !strings.Contains(s.Detail, test.detail) {
			t.Errorf("%v: %s: %s", test.keks, s.Result, s.Detail)
		}
		if fix := strings.Join(s.Fix, "\n"); test.fix != "" && fix != onBroker(test.fix) || test.fix == "" && fix != "" {
			t.Errorf("%v: the fix is %s", test.keks, fix)
		}
	}
}

// TestDoctorAsksBrokersWithoutAKEK examines nodes with a broker that is away, and names no KEK.
func TestDoctorAsksBrokersWithoutAKEK(t *testing.T) {
	for _, test := range []struct {
		urls []string
		want Result
	}{
		{[]string{"unix:///nowhere.sock"}, Skipped}, // nothing is set
		{[]string{"https://127.0.0.1:1"}, Failed},
		{[]string{"https://127.0.0.1:1", "https://127.0.0.1:2"}, Warning},
	} {
		broker, err := client.New(client.Config{URLs: test.urls})
		if err != nil {
			t.Fatal(err)
		}
		keys := grpc.NewServer()
		service := keyprovider.Service{Provider: keyprovider.New(broker, keyprovider.Config{})}
		service.Register(keys)
		d := &Doctor{Configuration: os.DevNull, Listen: "unix://" + serve(t, keys), Brokers: broker, BrokerURLs: test.urls, Containerd: "/nowhere.sock", ProviderNames: []string{"pilot"}}
		for step := range d.Examine(t.Context()) {
			if step.Name == StepBroker && (step.Result != test.want || test.want != Skipped && !strings.Contains(step.Detail, test.urls[0]+" does not answer")) {
				t.Errorf("%q: %+v", test.urls, step)
			}
		}
	}
}

// TestInterruptedWorkMayFinish interrupts a step, and lets another run out of time.
func TestInterruptedWorkMayFinish(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, interrupt := context.WithTimeout(t.Context(), time.Minute)
		work, stop := finishing(ctx)
		defer stop()
		interrupt()
		time.Sleep(finishTimeout - time.Nanosecond)
		synctest.Wait()
		if work.Err() != nil {
			t.Errorf("containerd's work is cut off: %v", work.Err())
		}
		time.Sleep(time.Nanosecond)
		synctest.Wait()
		if !errors.Is(work.Err(), context.Canceled) {
			t.Errorf("after %s it goes on: %v", finishTimeout, work.Err())
		}

		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		late, stop := finishing(ctx)
		defer stop()
		time.Sleep(time.Minute)
		synctest.Wait()
		if !errors.Is(late.Err(), context.DeadlineExceeded) {
			t.Errorf("after its time it goes on: %v", late.Err())
		}
	})
}
