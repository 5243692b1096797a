package wireformat

// Problem types of copilot's API (RFC 9457).
const (
	// ProblemNotExported: the KEK stays in its KMS; ask copilot to wrap and unwrap.
	ProblemNotExported = "urn:pilot:problem:not-exported"
	// ProblemNoSuchPath: the API has no such path, so this may be another service.
	ProblemNoSuchPath = "urn:pilot:problem:no-such-path"
	// ProblemNoSuchVersion: the KEK exists, but not in the version that was asked for.
	ProblemNoSuchVersion = "urn:pilot:problem:no-such-version"
	// ProblemNeedsApproval: a second admin has to approve it, then the request is repeated.
	ProblemNeedsApproval = "urn:pilot:problem:needs-approval"
	// ProblemNoNodeCA: this broker renews no certificates.
	ProblemNoNodeCA = "urn:pilot:problem:no-node-ca"
)
