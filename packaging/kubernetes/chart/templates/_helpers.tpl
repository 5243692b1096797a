{{- /* The labels of an object: list of the root and the app's name. */ -}}
{{- define "pilot.labels" -}}
app.kubernetes.io/name: {{ index . 1 }}
{{- with index . 0 }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}
{{- end }}

{{- /* An image: list of the root and its name. */ -}}
{{- define "pilot.image" -}}
{{- $root := index . 0 -}}
{{- $image := get $root.Values.images (index . 1) -}}
{{- $registry := required "images.registry: set the registry that has the images of pilot and copilot" $root.Values.images.registry -}}
{{- $registry }}/{{ $image.repository }}
{{- if $image.digest }}@{{ $image.digest }}{{ else }}:{{ $image.tag | default $root.Chart.AppVersion }}{{ end -}}
{{- end }}

{{- /* The broker's URL as nodes use it. */ -}}
{{- define "pilot.broker" -}}
{{- if .Values.broker.url -}}
{{ .Values.broker.url }}
{{- else -}}
{{- if not .Values.copilot.enabled }}{{ fail "broker.url: set the address of the copilot that the nodes use, since copilot.enabled is false" }}{{ end -}}
{{- $ip := required "copilot.service.clusterIP: set a free address of the Services' range, or broker.url: nodes don't ask the cluster's DNS" .Values.copilot.service.clusterIP -}}
https://{{ if contains ":" $ip }}[{{ $ip }}]{{ else }}{{ $ip }}{{ end }}:8443
{{- end -}}
{{- end }}

{{- /* Names and addresses of copilot's certificate, as JSON. */ -}}
{{- define "copilot.hosts" -}}
{{- $hosts := .Values.copilot.tls.hosts -}}
{{- if not $hosts -}}
{{- $hosts = list (printf "copilot.%s.svc" .Values.copilot.namespace) -}}
{{- with .Values.copilot.service.clusterIP }}{{ $hosts = prepend $hosts . }}{{ end -}}
{{- end -}}
{{- toJson $hosts -}}
{{- end }}

{{- /* TOML. Numbers in values are floats, and copilot's settings are integers. */ -}}
{{- define "pilot.toTOML" -}}
{{- $values := deepCopy . -}}
{{- include "pilot.toIntegers" $values -}}
{{ mustToToml $values | trim }}
{{- end }}

{{- /* Changes a dict. */ -}}
{{- define "pilot.toIntegers" -}}
{{- range $key, $value := . -}}
{{- if kindIs "map" $value -}}
{{- include "pilot.toIntegers" $value -}}
{{- else if kindIs "float64" $value -}}
{{- if eq (floor $value) $value }}{{ $_ := set $ $key (int64 $value) }}{{ end -}}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "copilot.toml" -}}
dir = "/var/lib/copilot" # the admin socket; nothing that has to stay
listen = [":8443"]
tls-cert = "/etc/copilot/tls/tls.crt"
tls-key = "/etc/copilot/tls/tls.key"
policy = "/etc/copilot/policy/policy.toml"
metrics-listen = ":9464"
# database comes as COPILOT_DATABASE, the master key as a credential.
{{- with .Values.copilot.settings }}
{{ include "pilot.toTOML" . }}
{{- end }}
{{- with .Values.copilot.backends }}

{{ include "pilot.toTOML" (dict "backends" .) }}
{{- end }}
{{- with .Values.copilot.keks }}

{{ include "pilot.toTOML" (dict "keks" .) }}
{{- end }}

[issuers.cluster]
# `issuer` in what `kubectl get --raw /.well-known/openid-configuration` prints.
url = {{ .Values.copilot.issuer | quote }}
# The API server itself: the jwks_uri printed there has the address of one of its hosts.
keys-url = "https://kubernetes.default.svc.cluster.local/openid/v1/jwks"
audience = "copilot"
ca = "/var/run/secrets/kubernetes.io/serviceaccount/ca.crt"
token-file = "/var/run/secrets/kubernetes.io/serviceaccount/token"
{{- if .Values.copilot.nodeAddresses }}
nodes-url = "https://kubernetes.default.svc.cluster.local/api/v1/nodes"
{{- end }}
{{- end }}

{{- define "copilot.policy" -}}
{{- if .Values.copilot.policy -}}
{{ .Values.copilot.policy | trim }}
{{- else -}}
{{- $account := printf "cluster:system:serviceaccount:%s:%s" .Release.Namespace .Values.pilot.name -}}
# This names pilot on all nodes. From Kubernetes 1.30 on each node is an identity of its
# own, which ends in @node/ and its name.
[[rule]]
identities = [{{ $account | quote }}]
keks = ["**"]
actions = ["unwrap"]

[[limit]]
identities = ["{{ $account }}@node/*"]
per-second = 200
burst = 1000
connections = 100

# Before Kubernetes 1.30 all nodes are one caller.
[[limit]]
identities = [{{ $account | quote }}]
per-second = 1000
burst = 2000
connections = 20000
{{- end -}}
{{- end }}
