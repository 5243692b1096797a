//go:build linux && !no_tpm

package tpm

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/ctrlplane/pilot/copilot/kms"
)

// pcrs are platform configuration registers (PCRs) of one bank.
type pcrs struct {
	bank    tpm2.TPMAlgID
	name    string // of the bank
	numbers []uint // in order
}

var banks = map[string]tpm2.TPMAlgID{"sha256": tpm2.TPMAlgSHA256, "sha384": tpm2.TPMAlgSHA384, "sha512": tpm2.TPMAlgSHA512}

// pcrCount is how many PCRs a PC's TPM has.
const pcrCount = 24

// resettable are PCRs that every program can set back.
var resettable = []uint{16, 23}

// parsePCRs parses a selection as tpm2-tools have it, "sha256:0,7".
func parsePCRs(text string) (*pcrs, error) {
	bank, list, ok := strings.Cut(text, ":")
	p := &pcrs{bank: banks[bank], name: bank}
	if !ok || p.bank == 0 {
		return nil, fmt.Errorf("pcrs = %q: give a bank, sha256, sha384 or sha512, and PCRs, as in sha256:0,7", text)
	}
	for number := range strings.SplitSeq(list, ",") {
		n, err := strconv.ParseUint(number, 10, 8)
		if err != nil || n >= pcrCount {
			return nil, fmt.Errorf("pcrs = %q: %q is not a PCR from 0 to %d", text, number, pcrCount-1)
		}
		if slices.Contains(resettable, uint(n)) {
			return nil, fmt.Errorf("pcrs = %q: every program can reset PCR %d, so it protects nothing", text, n)
		}
		p.numbers = append(p.numbers, uint(n))
	}
	slices.Sort(p.numbers)
	p.numbers = slices.Compact(p.numbers)
	return p, nil
}

// String returns what parsePCRs parses, in one way for each selection; "" for nil.
func (p *pcrs) String() string {
	if p == nil {
		return ""
	}
	var list []string
	for _, n := range p.numbers {
		list = append(list, strconv.FormatUint(uint64(n), 10))
	}
	return p.name + ":" + strings.Join(list, ",")
}

func (p *pcrs) selection(numbers ...uint) tpm2.TPMLPCRSelection {
	return tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{{Hash: p.bank, PCRSelect: tpm2.PCClientCompatible.PCRs(numbers...)}}}
}

// policy returns the policy by which the PCRs have to be as they are now. It is computed
// here: the TPM itself leaves out, without an error, what it does not have, and a policy
// over nothing always holds.
func (p *pcrs) policy(t transport.TPM) ([]byte, error) {
	values, err := p.read(t)
	if err != nil {
		return nil, err
	}
	digest := sha256.Sum256(values)
	policy, err := tpm2.NewPolicyCalculator(tpm2.TPMAlgSHA256)
	if err != nil {
		return nil, err
	}
	command := tpm2.PolicyPCR{PcrDigest: tpm2.TPM2BDigest{Buffer: digest[:]}, Pcrs: p.selection(p.numbers...)}
	if err := command.Update(policy); err != nil {
		return nil, err
	}
	return policy.Hash().Digest, nil
}

// read returns the values, one after the other.
func (p *pcrs) read(t transport.TPM) ([]byte, error) {
	var values []byte
	measured := false
	for _, n := range p.numbers {
		want := p.selection(n)
		got, err := tpm2.PCRRead{PCRSelectionIn: want}.Execute(t)
		if err != nil {
			return nil, err
		}
		if len(got.PCRValues.Digests) != 1 || !bytes.Equal(tpm2.Marshal(got.PCRSelectionOut), tpm2.Marshal(want)) {
			return nil, fmt.Errorf("%w: it has no PCR %d in the bank %s: that bank is off", kms.ErrForbidden, n, p.name)
		}
		value := got.PCRValues.Digests[0].Buffer
		measured = measured || len(bytes.Trim(value, "\x00")) > 0 && len(bytes.Trim(value, "\xff")) > 0
		values = append(values, value...)
	}
	if !measured {
		return nil, fmt.Errorf("%w: nothing was measured into %s, so a policy over it would protect nothing: choose other PCRs", kms.ErrForbidden, p)
	}
	return values, nil
}

// satisfy has a session show that the PCRs are as the policy wants them.
func (p *pcrs) satisfy(t transport.TPM, session tpm2.TPMISHPolicy, _ tpm2.TPM2BNonce) error {
	_, err := tpm2.PolicyPCR{PolicySession: session, Pcrs: p.selection(p.numbers...)}.Execute(t)
	return err
}
