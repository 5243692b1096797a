package doctor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	diffapi "github.com/containerd/containerd/api/services/diff/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containers/ocicrypt/config"
	protocol "github.com/containers/ocicrypt/keywrap/keyprovider"
	ocicryptpb "github.com/containers/ocicrypt/utils/keyprovider"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/ctrlplane/pilot/internal/layerkeys"
	"github.com/ctrlplane/pilot/keyprovider"
	"github.com/ctrlplane/pilot/node/containerd"
)

// keyProvider sends the key provider an invalid annotation, which pilot rejects without
// asking the broker.
func (e *examination) keyProvider(ctx context.Context) Step {
	if e.ListenTLS {
		return skipped(fmt.Sprintf("the key provider at %s requires a client certificate, and the doctor has none", e.Listen))
	}
	who := ""
	if path, isUnix := strings.CutPrefix(e.Listen, "unix://"); isUnix {
		var wrong *Step
		if who, wrong = e.socket(path); wrong != nil {
			return *wrong
		}
	}
	conn, err := dial(e.Listen)
	if err != nil {
		return failed(err.Error(), "correct listen in "+e.Configuration)
	}
	defer conn.Close()
	in, err := json.Marshal(protocol.KeyProviderKeyWrapProtocolInput{
		Operation:       protocol.OpKeyUnwrap,
		KeyUnwrapParams: protocol.KeyUnwrapParams{Dc: &config.DecryptConfig{}, Annotation: []byte("pilot node doctor is here")},
	})
	if err != nil {
		return failed(err.Error())
	}
	var header metadata.MD
	_, err = unwrapAt(conn, grpc.Header(&header))(keyprovider.Probe(ctx), in)
	if status.Code(err) == codes.InvalidArgument {
		return passed(strings.Join(append([]string{e.Listen + who}, header[keyprovider.FIPSKey]...), "; "))
	}
	return noPilot(e.Listen, "key provider", err)
}

// differ sends the differ a request without a namespace, which pilot rejects without
// asking containerd.
func (e *examination) differ(ctx context.Context) Step {
	if e.DiffSocket == "" {
		return skipped("diff-listen is off")
	}
	who, wrong := e.socket(e.DiffSocket)
	if wrong != nil {
		return *wrong
	}
	target := "unix://" + e.DiffSocket
	conn, err := dial(target)
	if err != nil {
		return failed(err.Error(), "correct diff-listen in "+e.Configuration)
	}
	defer conn.Close()
	_, err = diffapi.NewDiffClient(conn).Apply(ctx, &diffapi.ApplyRequest{Diff: &types.Descriptor{MediaType: ocispec.MediaTypeImageLayer}})
	// Servers without this service return that code too. The messages of pilot's differ
	// begin with its name, in all versions.
	if status.Code(err) == codes.Unimplemented && strings.HasPrefix(status.Convert(err).Message(), "pilot: ") {
		layers, err := layerkeys.Inspect(e.LayerRecord)
		if err != nil {
			return failed(err.Error(), restartPilot...)
		}
		detail := fmt.Sprintf("%s%s, which has recorded the keys of %d layers", target, who, layers)
		for _, rule := range e.MustBeEncrypted {
			detail += "; " + rule.String()
		}
		return passed(detail)
	}
	return noPilot(target, "differ", err)
}

func dial(target string) (*grpc.ClientConn, error) {
	return grpc.NewClient(target, grpc.WithTransportCredentials(insecure.NewCredentials()))
}

// ask is one of the two methods of the key provider protocol, in its JSON.
type ask func(context.Context, []byte) ([]byte, error)

func wrapAt(conn *grpc.ClientConn) ask {
	client := ocicryptpb.NewKeyProviderServiceClient(conn)
	return func(ctx context.Context, in []byte) ([]byte, error) {
		out, err := client.WrapKey(ctx, &ocicryptpb.KeyProviderKeyWrapProtocolInput{KeyProviderKeyWrapProtocolInput: in})
		return out.GetKeyProviderKeyWrapProtocolOutput(), err
	}
}

func unwrapAt(conn *grpc.ClientConn, opts ...grpc.CallOption) ask {
	client := ocicryptpb.NewKeyProviderServiceClient(conn)
	return func(ctx context.Context, in []byte) ([]byte, error) {
		out, err := client.UnWrapKey(ctx, &ocicryptpb.KeyProviderKeyWrapProtocolInput{KeyProviderKeyWrapProtocolInput: in}, opts...)
		return out.GetKeyProviderKeyWrapProtocolOutput(), err
	}
}

// Commands that start pilot, and show why it does not start.
var (
	startPilot   = []string{"systemctl start pilot.service", "journalctl -u pilot.service -n 30"}
	restartPilot = []string{"systemctl restart pilot.service", "journalctl -u pilot.service -n 30"}
)

// installPilot is the command that sets up a node without pilot.
const installPilot = "pilot node install --now --broker https://copilot.example.com:8443 …"

// socket checks the file of one of pilot's sockets. It returns a note about who else may
// use it, or the failed step.
func (e *examination) socket(path string) (who string, wrong *Step) {
	fail := func(detail string, fix ...string) (string, *Step) {
		step := failed(detail, fix...)
		return "", &step
	}
	info, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist) && !exists(e.Configuration):
		return fail(fmt.Sprintf("%s does not exist, nor does %s: pilot is not installed on this machine", path, e.Configuration), installPilot)
	case errors.Is(err, fs.ErrNotExist):
		return fail(path+" does not exist: pilot is not running", startPilot...)
	case err != nil:
		return fail(err.Error(), "ls -l "+path)
	case info.Mode().Type() != fs.ModeSocket:
		return fail(path+" is not a socket: pilot can't listen there while it is in the way", append([]string{"mv " + path + " " + path + ".away"}, startPilot...)...)
	}
	// Connecting requires write permission.
	switch mode := info.Mode().Perm(); {
	case mode&0o002 != 0:
		return fail(fmt.Sprintf("%s has mode %04o: every user of this machine can have layers decrypted (a systemd unit that makes it needs SocketMode=0600)", path, mode),
			"chmod 0600 "+path)
	case mode&0o020 != 0:
		who = fmt.Sprintf(" (mode %04o: its group may use it, too)", mode)
	}
	return who, nil
}

// noPilot returns the step for a server that did not respond as pilot does.
func noPilot(target, what string, err error) Step {
	switch status.Code(err) {
	case codes.Unavailable:
		return failed(fmt.Sprintf("%s: no connection: %s", target, said(err)), startPilot...)
	case codes.DeadlineExceeded:
		return failed(target+" accepts connections but does not respond: pilot hangs, or systemd holds the socket and pilot does not start", restartPilot...)
	case codes.OK:
		err = errors.New("it accepted an invalid request")
	}
	return failed(fmt.Sprintf("%s: the server there is not pilot's %s: %s", target, what, said(err)), append([]string{"ss -lp | grep " + containerd.SocketPath(target)}, restartPilot...)...)
}

// said returns the message of an error without what gRPC adds to it.
func said(err error) string {
	s, isStatus := status.FromError(err)
	if !isStatus {
		return err.Error()
	}
	if dialing, ok := strings.CutPrefix(s.Message(), `connection error: desc = "transport: Error while dialing: `); ok {
		return strings.TrimSuffix(dialing, `"`)
	}
	return s.Message()
}
