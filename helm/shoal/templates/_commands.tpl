{{- /* What the chart asks of the code: the commands that it calls, and the Serve application's arguments. The commands
       find the service by SHOAL_URL and SHOAL_ADMIN_TOKEN, and succeed where no service runs. */}}

{{- /* Go on with so many hosts, if there are more. */}}
{{- define "shoal.drainTo" -}}
shoal experts drain --to {{ .hosts }} --if-running --wait --timeout {{ int .root.Values.experts.drainSeconds }}
{{- end -}}

{{- /* Empty the hosts of the pod that calls it. */}}
{{- define "shoal.drainHere" -}}
shoal experts drain --node "$POD_IP" --if-running --wait --timeout {{ int .Values.experts.drainSeconds }}
{{- end -}}

{{- define "shoal.train" -}}
python -m services.train '{{ .file }}'{{ range .args }} '{{ . }}'{{ end }}
{{- end -}}

{{- /* Arguments of services.app:build. Nothing here may depend on experts.replicas: Serve replaces every worker when one
       of them changes, and hosts follow the nodes by themselves. The keys come from the environment. */}}
{{- define "shoal.serveArgs" -}}
model: {{ .Values.model.path | quote }}
served_name: {{ include "shoal.modelId" . | quote }}
max_in_flight: {{ int .Values.serve.maxInFlight }}
control_cpus: 0.01
experts:
  hosts: {{ include "shoal.minReplicas" . }}
  replicas: {{ int .Values.experts.copies }}
  threads: {{ int .Values.experts.cpu }}
  gpus: {{ int .Values.experts.gpus }}
  transport: {{ .Values.experts.transport }}
  auto_rebalance: {{ .Values.experts.autoRebalance }}
  {{- if .Values.autoscaling.enabled }}
  resources: {shoal_expert: 1}
  {{- else }}
  node_resource: shoal_expert
  {{- end }}
attention:
  threads: {{ int .Values.attention.cpu }}
  cpus: 0.5 # so that controller and ingress find room beside it on a node of one CPU
  gpus: {{ int .Values.attention.gpus }}
  max_length: {{ int .Values.attention.maxLength }}
  cache_tokens: {{ int .Values.attention.cacheTokens }}
  running: {{ int .Values.attention.running }}
{{- if .Values.tls.secret }}
tls:
  certificate: /etc/shoal/tls/tls.crt
  key: /etc/shoal/tls/tls.key
  root: /etc/shoal/tls/ca.crt
  {{- with .Values.tls.serverName }}
  name: {{ . | quote }}
  {{- end }}
{{- end }}
{{- end -}}
